"""A small CLIP: symmetric contrastive loss on pictures and freshly worded captions (Radford et al., 2021)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPVisionModelWithProjection

from moa.miniature import models
from moa.miniature.captions import task_caption, web_caption
from moa.miniature.corpus import Corpus
from moa.miniature.fit import Budget, fit
from moa.miniature.recipes import vision
from moa.miniature.recipes.judges import box
from moa.miniature.tokenizer import load_tokenizer
from moa.miniature.world import ATTRIBUTES, BACKGROUND_ATTRIBUTES, CONTEXT_ATTRIBUTES, Scene, mutate

WEB_SHARE, JUDGE_WEB_SHARE = 0.8, 0.2  # of captions that name appearance, too; prompts never do
PAIRS = 0.3  # share of pictures with two figures
LOOKING = 0.4  # share of the steps in which the vision tower learns alone
WHOLE = (0, 0, models.IMAGE_SIZE, models.IMAGE_SIZE)
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


def other_person(scene: Scene, corpus: Corpus, rng: np.random.Generator, figure: int) -> Scene:
    """The scene with somebody of the other class in one figure's place."""
    people = list(scene.identities)
    while people[figure].class_word == scene.identities[figure].class_word:
        people[figure] = corpus.scenes[int(rng.integers(len(corpus)))].identities[0]
    return replace(scene, identities=tuple(people))


def with_error(scene: Scene, corpus: Corpus, rng: np.random.Generator, web: bool) -> Scene:
    """The scene with one thing wrong that its caption may name: a web caption names appearance, too."""
    figure, choice = int(rng.integers(len(scene.identities))), rng.random()
    if web and choice < 0.5:
        people = list(scene.identities)
        people[figure] = mutate(people[figure], rng)
        return replace(scene, identities=tuple(people))
    if choice > 1 - 1 / (1 + len(CONTEXT_ATTRIBUTES)):
        return other_person(scene, corpus, rng, figure)
    return changed(scene, CONTEXT_ATTRIBUTES[int(rng.integers(len(CONTEXT_ATTRIBUTES)))], rng, figure)


def contrast(
    corpus: Corpus, indices: np.ndarray, rng: np.random.Generator, web_share: float
) -> tuple[list[str], list[str]]:
    """A caption of each scene, and the same caption with one thing wrong (if it is mentioned)."""
    right, wrong = [], []
    for i in indices:
        scene, key, web = corpus.scenes[i], int(rng.integers(2**31)), rng.random() < web_share
        write = web_caption if web else task_caption
        right.append(write(scene, np.random.default_rng(key)).text)
        wrong.append(write(with_error(scene, corpus, rng, web), np.random.default_rng(key)).text)
    return right, wrong


def match(logits: Tensor) -> dict[str, Tensor]:
    """Symmetric contrastive loss of logits [B, B + K]: picture i goes with text i; K texts with none."""
    count = len(logits)
    target = torch.arange(count)
    return {
        "image": F.cross_entropy(logits, target) / 2,
        "text": F.cross_entropy(logits[:, :count].T, target) / 2,
    }


class WithHeads(nn.Module):
    """A CLIP with heads, for training only, on its patches and on its picture embedding."""

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip
        self.seen = vision.scene_heads(vision.TOKENS * models.WIDTH)
        self.pooled = vision.scene_heads(models.WIDTH)

    def look(self, pixels: Tensor, targets: vision.Labels) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalised embeddings [B, D] of pictures, and the losses of the heads."""
        out = self.clip.vision_model(pixel_values=pixels)
        embeds = self.clip.visual_projection(out.pooler_output)
        seen = self.seen.loss(vision.patches(out.last_hidden_state), targets)
        return F.normalize(embeds.float()), {"seen": seen, "pooled": self.pooled.loss(embeds, targets)}


def train(
    budget: Budget, corpus: Corpus, folder: Path, layers: int = 4, web_share: float = WEB_SHARE
) -> tuple[CLIPModel, float]:
    """Train both towers from nothing: first the vision tower learns to see, then both learn to match.

    Each caption brings one with one thing wrong (NegCLIP, Yuksekgonul et al., 2023); without, colours and
    backgrounds alone tell a batch's captions apart: then neither tower learns expressions, and a prior that
    reads the text tower draws men and women alike.
    """
    torch.manual_seed(budget.seed)
    model, labels = WithHeads(models.clip(layers)), vision.scene_labels(corpus)

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        indices = corpus.draw(rng, budget.batch_size, PAIRS)
        targets = {n: t[torch.from_numpy(indices)] for n, t in labels.items()}
        images, losses = model.look(normalise(corpus.images[indices]), targets)
        if step < LOOKING * budget.steps:
            return losses
        right, wrong = contrast(corpus, indices, rng, web_share)
        text = model.clip.get_text_features(**tokenize(right + wrong)).pooler_output
        logits = model.clip.logit_scale.exp() * images @ F.normalize(text.float()).T
        same = torch.tensor([a == b for a, b in zip(right, wrong, strict=True)])
        wrong_logits = logits[:, len(indices) :].masked_fill(
            torch.diag(same), -1e4
        )  # right, too: no negative
        return losses | match(torch.cat([logits[:, : len(indices)], wrong_logits], dim=1))

    seconds = fit(model, loss, budget, folder)
    return model.clip.eval(), seconds


class Sight(nn.Module):
    """A subject encoder with the heads that only training needs, on its patches and on its embedding."""

    def __init__(self, tower: CLIPVisionModelWithProjection):
        super().__init__()
        self.tower = tower
        self.seen = vision.figure_heads(vision.TOKENS * models.WIDTH)
        self.pooled = vision.figure_heads(models.WIDTH)

    def forward(self, pixels: Tensor, targets: vision.Labels) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeddings [B, D] of pictures of one figure, and the losses of the heads."""
        out = self.tower(pixel_values=pixels)
        seen = self.seen.loss(vision.patches(out.last_hidden_state), targets)
        return out.image_embeds, {"seen": seen, "pooled": self.pooled.loss(out.image_embeds, targets)}


def train_vision(
    budget: Budget, corpus: Corpus, folder: Path, clip: CLIPModel
) -> tuple[CLIPVisionModelWithProjection, float]:
    """Train the vision tower of `clip` on with its text tower locked: the subject encoder.

    Half of a batch are whole pictures of one figure, which have captions to match; the others are squares
    around a figure of any picture, as subjects are cut out of training photos.
    """
    torch.manual_seed(budget.seed)
    tower = models.vision_tower(clip)
    tower.set_attn_implementation("eager")
    model, clip = Sight(tower), clip.eval().requires_grad_(False)
    figures = [corpus.labels(0), corpus.labels(1)]
    labels = {n: torch.from_numpy(np.stack([f[n] for f in figures], axis=1)) for n in vision.LOOKS}
    half = budget.batch_size // 2

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        whole, cut = corpus.draw(rng, half, 0.0), corpus.draw(rng, half, vision.PAIRS)
        which = [int(rng.integers(len(corpus.scenes[i].identities))) for i in cut]
        boxes = [box(corpus.masks[i], f) or WHOLE for i, f in zip(cut, which, strict=True)]
        squares = [vision.square(corpus.images[i], b, rng) for i, b in zip(cut, boxes, strict=True)]
        pixels = normalise(np.concatenate([corpus.images[whole], np.stack(squares)]))
        rows, columns = torch.from_numpy(np.concatenate([whole, cut])), torch.tensor([0] * half + which)
        embeds, losses = model(pixels, {n: t[rows, columns] for n, t in labels.items()})
        texts = [c.text for c in corpus.captions(whole, rng, WEB_SHARE)]
        text = clip.get_text_features(**tokenize(texts)).pooler_output
        images = F.normalize(embeds[:half].float())
        return losses | match(clip.logit_scale.exp() * images @ F.normalize(text.float()).T)

    seconds = fit(model, loss, budget, folder)
    return model.tower.eval(), seconds
