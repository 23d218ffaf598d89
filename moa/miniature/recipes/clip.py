"""A small CLIP: symmetric contrastive loss on pictures and freshly worded captions (Radford et al., 2021)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel

from moa.miniature import models
from moa.miniature.captions import task_caption, web_caption
from moa.miniature.corpus import Corpus
from moa.miniature.fit import Budget, LossFunction, fit
from moa.miniature.tokenizer import load_tokenizer
from moa.miniature.world import ATTRIBUTES, BACKGROUND_ATTRIBUTES, CONTEXT_ATTRIBUTES, Scene

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIPImageProcessor's


def normalise(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] → CLIP's normalised pixels [B, 3, H, W]."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def tokenize(texts: list[str]) -> dict[str, Tensor]:
    """Ids and mask, padded to the longest text."""
    tokens = load_tokenizer()(texts, padding=True, truncation=True, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def changed(scene: Scene, name: str, rng: np.random.Generator, figure: int = 0) -> Scene:
    """The scene with another value of one context attribute, of one figure where it is a figure's."""
    context, appearances = scene.context, list(scene.context.appearances)
    others = [
        v for v in ATTRIBUTES[name] if v != getattr(appearances[figure], name, getattr(context, name, None))
    ]
    value: Any = {name: others[int(rng.integers(len(others)))]}
    if name in BACKGROUND_ATTRIBUTES:
        return replace(scene, context=replace(context, **value))
    appearances[figure] = replace(appearances[figure], **value)
    return replace(scene, context=replace(context, appearances=tuple(appearances)))


def contrast(
    corpus: Corpus, indices: np.ndarray, rng: np.random.Generator, web_share: float
) -> tuple[list[str], list[str]]:
    """A caption of each scene, and the same caption with one context attribute wrong (if it is mentioned)."""
    right, wrong = [], []
    for i in indices:
        scene, key = corpus.scenes[i], int(rng.integers(2**31))
        write = web_caption if rng.random() < web_share else task_caption
        name = CONTEXT_ATTRIBUTES[int(rng.integers(len(CONTEXT_ATTRIBUTES)))]
        other = changed(scene, name, rng, int(rng.integers(len(scene.identities))))
        right.append(write(scene, np.random.default_rng(key)).text)
        wrong.append(write(other, np.random.default_rng(key)).text)
    return right, wrong


def loss_function(
    model: CLIPModel, corpus: Corpus, budget: Budget, web_share: float, hard_negatives: bool
) -> LossFunction:
    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        indices = rng.integers(len(corpus), size=budget.batch_size)
        if hard_negatives:
            right, wrong = contrast(corpus, indices, rng, web_share)
        else:
            right, wrong = [c.text for c in corpus.captions(indices, rng, web_share)], []
        out = model(pixel_values=normalise(corpus.images[indices]), **tokenize(right + wrong))
        logits, count = out.logits_per_image.float(), len(indices)
        target = torch.arange(count)
        if wrong:  # a text that is right, too, is no negative
            same = torch.tensor([a == b for a, b in zip(right, wrong, strict=True)])
            logits = torch.cat(
                [logits[:, :count], logits[:, count:].masked_fill(torch.diag(same), -1e4)], dim=1
            )
        return {
            "image": F.cross_entropy(logits, target) / 2,
            "text": F.cross_entropy(logits[:, :count].T, target) / 2,
        }

    return loss


def train(
    budget: Budget,
    corpus: Corpus,
    folder: Path,
    layers: int = 4,
    web_share: float = 0.8,
    hard_negatives: bool = False,
) -> tuple[CLIPModel, float]:
    """Train both towers from nothing; returns the model and the seconds spent.

    hard_negatives: each caption brings one with one attribute wrong (NegCLIP, Yuksekgonul et al., 2023);
        without, colours and backgrounds alone tell a batch's captions apart, and expressions go unlearned.
    """
    torch.manual_seed(budget.seed)
    model = models.clip(layers)
    seconds = fit(model, loss_function(model, corpus, budget, web_share, hard_negatives), budget, folder)
    return model.eval(), seconds
