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

from moa.evaluation.identity import unit

Floats = NDArray[np.float64]


class ClipJudge:
    """A CLIP that shares no weights with the prior's text encoder or the subject encoder."""

    def __init__(self, id: str, revision: str | None = None, device: str = "cpu"):
        """Load model, tokenizer and image processor from a folder or hub name; OSError if there is none."""
        self.tokenizer = AutoTokenizer.from_pretrained(id, revision=revision)
        self.processor = AutoImageProcessor.from_pretrained(id, revision=revision, backend="pil")
        self.model = CLIPModel.from_pretrained(id, revision=revision).to(device).eval()
        self.device = device

    @torch.inference_mode()
    def image_features(self, images: Sequence[Image.Image]) -> Floats:
        """Unit vectors [N, D] of RGB images."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        return unit(self.model.get_image_features(pixel_values=pixels).pooler_output.cpu().numpy())

    @torch.inference_mode()
    def text_features(self, prompts: Sequence[str]) -> Floats:
        """Unit vectors [N, D] of prompts. Raises ValueError naming a prompt that the model cannot read whole."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding=True, return_tensors="pt")
        for prompt, mask in zip(prompts, tokens["attention_mask"], strict=True):
            if mask.sum() > limit:
                raise ValueError(f"prompt has {mask.sum()} tokens, but the judge reads {limit}; shorten {prompt!r}")
        output = self.model.get_text_features(**tokens.to(self.device))
        return unit(output.pooler_output.cpu().numpy())


def consistency(images: Floats, texts: Floats) -> Floats:
    """Cosines [N] between unit vectors [N, D] of images and of their prompts."""
    return np.einsum("nd,nd->n", images, texts)
