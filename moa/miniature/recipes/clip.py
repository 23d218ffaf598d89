"""A small CLIP: symmetric contrastive loss on pictures and freshly worded captions (Radford et al., 2021)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel

from moa.miniature import models
from moa.miniature.corpus import Corpus
from moa.miniature.fit import Budget, LossFunction, fit
from moa.miniature.tokenizer import load_tokenizer

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIPImageProcessor's


def normalise(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] → CLIP's normalised pixels [B, 3, H, W]."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def tokenize(texts: list[str]) -> dict[str, Tensor]:
    """Ids and mask, padded to the longest text."""
    tokens = load_tokenizer()(texts, padding=True, truncation=True, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def loss_function(model: CLIPModel, corpus: Corpus, budget: Budget, web_share: float) -> LossFunction:
    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        indices = rng.integers(len(corpus), size=budget.batch_size)
        texts = [c.text for c in corpus.captions(indices, rng, web_share)]
        out = model(pixel_values=normalise(corpus.images[indices]), **tokenize(texts))
        logits = out.logits_per_image.float()
        target = torch.arange(len(indices))
        return {"image": F.cross_entropy(logits, target) / 2, "text": F.cross_entropy(logits.T, target) / 2}

    return loss


def train(
    budget: Budget, corpus: Corpus, folder: Path, layers: int = 4, web_share: float = 0.8
) -> tuple[CLIPModel, float]:
    """Train both towers from nothing; returns the model and the seconds spent."""
    torch.manual_seed(budget.seed)
    model = models.clip(layers)
    seconds = fit(model, loss_function(model, corpus, budget, web_share), budget, folder)
    return model.eval(), seconds
