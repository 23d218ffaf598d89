"""The annotators: a tiny BLIP-2 that writes task captions and a tiny Mask2Former that finds people."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2ForConditionalGeneration, Mask2FormerForUniversalSegmentation

from moa.miniature import models
from moa.miniature.captions import Wording, task_caption
from moa.miniature.corpus import Corpus
from moa.miniature.fit import Budget, fit
from moa.miniature.recipes.clip import normalise
from moa.miniature.tokenizer import load_tokenizer
from moa.miniature.world import APPEARANCE_ATTRIBUTES, ATTRIBUTES, BACKGROUND_ATTRIBUTES

HEADS = ("class", *APPEARANCE_ATTRIBUTES, "prop")

FULL = Wording(
    context=1.0, generic=0.0, prefix=0.0
)  # a captioner names all it sees, always in the same order


def caption_batch(corpus: Corpus, indices: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
    """Inputs of Blip2ForConditionalGeneration: image placeholders, then the caption, which has the loss."""
    tokenizer = load_tokenizer()
    texts = [task_caption(corpus.scenes[i], rng, FULL).text for i in indices]
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    images = torch.full((len(indices), models.QUERY_TOKENS), models.image_token_id())
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    return {
        "pixel_values": normalise(corpus.images[indices]),
        "input_ids": torch.cat([images, ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(images), mask], dim=1),
        "labels": torch.cat([torch.full_like(images, -100), labels], dim=1),
    }


class WithHeads(nn.Module):
    """A captioner with linear heads, needed in training only, that read attributes off the Q-Former's output.

    Words alone teach the vision tower slowly: most of a caption is grammar. Heads: context attributes and
    the class of either figure, the background, and whether there is a second figure.
    """

    def __init__(self, captioner: Blip2ForConditionalGeneration):
        super().__init__()
        self.captioner = captioner
        width = models.QUERY_TOKENS * models.WIDTH
        sizes = {f"{n}_{i}": len(ATTRIBUTES[n]) for n in HEADS for i in range(2)}
        sizes |= {n: len(ATTRIBUTES[n]) for n in BACKGROUND_ATTRIBUTES} | {"second": 2}
        self.heads = nn.ModuleDict({n: nn.Linear(width, size) for n, size in sizes.items()})

    def forward(self, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of the text [B, L, V] and of every head."""
        out = self.captioner(**batch)
        queries = out.qformer_outputs.last_hidden_state.flatten(1)
        return out.logits, {n: head(queries) for n, head in self.heads.items()}


def head_targets(corpus: Corpus) -> dict[str, Tensor]:
    """Class index [N] for each head; −1 where there is no such figure."""
    figures = [corpus.labels(0), corpus.labels(1)]
    targets = {f"{n}_{i}": torch.from_numpy(figures[i][n]) for n in HEADS for i in range(2)}
    targets |= {n: torch.from_numpy(figures[0][n]) for n in BACKGROUND_ATTRIBUTES}
    return targets | {"second": (targets["class_1"] >= 0).long()}


def train_captioner(
    budget: Budget, corpus: Corpus, folder: Path
) -> tuple[Blip2ForConditionalGeneration, float]:
    """Picture → full task caption, by cross-entropy on words and on attributes; all from nothing."""
    torch.manual_seed(budget.seed)
    model, targets = WithHeads(models.captioner()), head_targets(corpus)

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        indices = rng.integers(len(corpus), size=budget.batch_size)
        batch = caption_batch(corpus, indices, rng)
        labels = batch.pop("labels")
        logits, heads = model(**batch)
        words = logits[:, :-1].float().flatten(0, 1)
        named = [
            F.cross_entropy(heads[n].float(), t[torch.from_numpy(indices)], ignore_index=-1)
            for n, t in targets.items()
        ]
        return {
            "caption": F.cross_entropy(words, labels[:, 1:].flatten(), ignore_index=-100),
            "attributes": torch.stack(named).mean(),
        }

    seconds = fit(model, loss, budget, folder)
    return model.captioner.eval(), seconds


def segment_targets(mask: np.ndarray) -> tuple[Tensor, Tensor]:
    """Id map [H, W] → (binary masks [K, H, W], classes [K]): background first, then each person."""
    values = [v for v in range(int(mask.max()) + 1) if (mask == v).any()]
    masks = torch.from_numpy(np.stack([mask == v for v in values])).float()
    classes = [models.LABELS.index("person" if v else "background") for v in values]
    return masks, torch.tensor(classes)


def train_segmenter(
    budget: Budget, corpus: Corpus, folder: Path
) -> tuple[Mask2FormerForUniversalSegmentation, float]:
    """Panoptic segmentation of persons and background with the true masks, by Mask2Former's own loss."""
    torch.manual_seed(budget.seed)
    model = models.segmenter()

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        indices = rng.integers(len(corpus), size=budget.batch_size)
        x = models.segmenter_pixels(corpus.images[indices])
        targets = [segment_targets(corpus.masks[i]) for i in indices]
        masks = [F.interpolate(m[None], x.shape[-2:], mode="nearest")[0] for m, _ in targets]
        out = model(pixel_values=x, mask_labels=masks, class_labels=[c for _, c in targets])
        return {"segment": out.loss.squeeze()}

    seconds = fit(model, loss, budget, folder)
    return model.eval(), seconds
