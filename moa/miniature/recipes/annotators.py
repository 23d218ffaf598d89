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
from moa.miniature.recipes import vision
from moa.miniature.recipes.clip import normalise
from moa.miniature.tokenizer import load_tokenizer

LOOKING = 0.7  # share of the captioner's steps in which it learns to see, before it learns to tell

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
        "input_ids": torch.cat([images, ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(images), mask], dim=1),
        "labels": torch.cat([torch.full_like(images, -100), labels], dim=1),
    }


class WithHeads(nn.Module):
    """A captioner with heads, for training only, on the vision tower's patches and on the Q-Former's output.

    Words alone teach the vision tower slowly: most of a caption is grammar.
    """

    def __init__(self, captioner: Blip2ForConditionalGeneration):
        super().__init__()
        self.captioner = captioner
        self.seen = vision.scene_heads(vision.TOKENS * models.WIDTH)
        self.asked = vision.scene_heads(models.QUERY_TOKENS * models.WIDTH)

    def look(self, pixels: Tensor, targets: vision.Labels) -> dict[str, Tensor]:
        """The losses of the vision tower and of the queries, without a word."""
        hidden = self.captioner.vision_model(pixel_values=pixels).last_hidden_state
        queries = self.captioner.query_tokens.expand(len(pixels), -1, -1)
        asked = self.captioner.qformer(query_embeds=queries, encoder_hidden_states=hidden).last_hidden_state
        return {
            "seen": self.seen.loss(vision.patches(hidden), targets),
            "asked": self.asked.loss(asked.flatten(1), targets),
        }

    def tell(self, batch: dict[str, Tensor], targets: vision.Labels) -> dict[str, Tensor]:
        """The losses of all parts."""
        labels = batch.pop("labels")
        out = self.captioner(**batch)
        words = out.logits[:, :-1].float().flatten(0, 1)
        return {
            "caption": F.cross_entropy(words, labels[:, 1:].flatten(), ignore_index=-100),
            "seen": self.seen.loss(vision.patches(out.vision_outputs.last_hidden_state), targets),
            "asked": self.asked.loss(out.qformer_outputs.last_hidden_state.flatten(1), targets),
        }


def train_captioner(
    budget: Budget, corpus: Corpus, folder: Path
) -> tuple[Blip2ForConditionalGeneration, float]:
    """Picture → full task caption: first vision tower and queries learn to see, then all parts to tell."""
    torch.manual_seed(budget.seed)
    model, labels = WithHeads(models.captioner()), vision.scene_labels(corpus)

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        indices = corpus.draw(rng, budget.batch_size, vision.PAIRS)
        targets = {n: t[torch.from_numpy(indices)] for n, t in labels.items()}
        pixels = vision.jitter(normalise(corpus.images[indices]), rng)
        if step < LOOKING * budget.steps:
            return model.look(pixels, targets)
        return model.tell({"pixel_values": pixels, **caption_batch(corpus, indices, rng)}, targets)

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
        indices = corpus.draw(rng, budget.batch_size, vision.PAIRS)
        x = models.segmenter_pixels(corpus.images[indices])
        targets = [segment_targets(corpus.masks[i]) for i in indices]
        masks = [F.interpolate(m[None], x.shape[-2:], mode="nearest")[0] for m, _ in targets]
        out = model(pixel_values=x, mask_labels=masks, class_labels=[c for _, c in targets])
        return {"segment": out.loss.squeeze()}

    seconds = fit(model, loss, budget, folder)
    return model.eval(), seconds
