"""Prompt consistency (PC): the cosine between a CLIP's image and text vectors, unscaled.

The text is the prompt with the subject's class word and without any placeholder, as FastComposer scores it.
Images are PNG and go through the model's own image processor; FastComposer resized JPEGs as tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from moa.data.annotators import load
from moa.evaluation.identity import unit
from moa.methods import ModelSource

Floats = NDArray[np.float64]


class ClipJudge:
    """A CLIP that shares no weights with the prior's text encoder or the subject encoder."""

    def __init__(self, source: ModelSource, device: str = "cpu"):
        """Load it. Raises DataError naming the key and the cure if that fails."""
        self.tokenizer = load(AutoTokenizer, source, "clip_judge")
        self.processor = load(AutoImageProcessor, source, "clip_judge", backend="pil")
        self.model = load(CLIPModel, source, "clip_judge", dtype=torch.float32).to(device).eval()
        self.device = device

    @torch.inference_mode()
    def image_features(self, images: Sequence[Image.Image]) -> Floats:
        """Unit vectors [N, D] of RGB images."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        return unit(self.model.get_image_features(pixel_values=pixels).pooler_output.cpu().numpy())

    @torch.inference_mode()
    def text_features(self, prompts: Sequence[str]) -> Floats:
        """Unit vectors [N, D] of prompts. Raises ValueError naming one that is too long for the model."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding=True, return_tensors="pt")
        for prompt, mask in zip(prompts, tokens["attention_mask"], strict=True):
            if mask.sum() > limit:
                raise ValueError(
                    f"prompt has {mask.sum()} tokens, but the judge reads {limit}; shorten {prompt!r}"
                )
        output = self.model.get_text_features(**tokens.to(self.device))
        return unit(output.pooler_output.cpu().numpy())
