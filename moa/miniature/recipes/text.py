"""Teaching the prior's text tower to keep apart what pictures hardly do: a sweater and a shirt, sad and calm.

Where pictures differ in a few pixels, a contrastive loss lets two words end as near as synonyms, and a U-Net
that reads the tower draws one for the other. Linear heads that only training needs name what a caption says
from any position at or behind its end; all else is held where the U-Net has learnt to read it. Half of the
captions are loose: held only in the wording of captions, the tower forgets other wordings, and the U-Net
draws one person for "a man smiling, and a man sad".
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel

from moa.miniature.captions import Caption
from moa.miniature.corpus import Corpus
from moa.miniature.fit import Budget, fit
from moa.miniature.recipes.judges import FIGURE_ATTRIBUTES
from moa.miniature.recipes.prior import WEB_SHARE
from moa.miniature.tokenizer import load_tokenizer
from moa.miniature.world import ATTRIBUTES, BACKGROUND_ATTRIBUTES

FIGURES = 2
TOLD = 3.0  # weight of the heads against staying where the U-Net reads
LOOSE_SHARE = 0.5  # of the captions
NAMES = {f"{name}_{i}": name for name in FIGURE_ATTRIBUTES for i in range(FIGURES)} | {
    name: name for name in BACKGROUND_ATTRIBUTES
}  # of the heads, and the attribute that each names
CLASSES = {head: len(ATTRIBUTES[name]) for head, name in NAMES.items()} | {"people": FIGURES}


def told(captions: Sequence[Caption]) -> dict[str, Tensor]:
    """Class index [N] of what each caption says, for every head; −1 where it says nothing.

    Of "people", the index is one less than how many there are.
    """
    facts = [
        {f"{name}_{i}": value for i, said in enumerate(c.facts["figures"]) for name, value in said.items()}
        | c.facts["scene"]
        for c in captions
    ]
    attributes = {
        head: torch.tensor([ATTRIBUTES[name].index(f[head]) if head in f else -1 for f in facts])
        for head, name in NAMES.items()
    }
    return attributes | {"people": torch.tensor([len(c.facts["figures"]) - 1 for c in captions])}


def name_loss(head: nn.Module, states: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of a head whose rows have length 1, on states [B, D]; 0 where no target says anything."""
    rows, bias = torch.as_tensor(head.weight), torch.as_tensor(head.bias)
    logits = F.linear(states, F.normalize(rows, dim=1), bias)
    loss = F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
    return loss / (target >= 0).sum().clamp(min=1)


class WithHeads(nn.Module):
    """A text tower, the one that it was, and a linear classifier of each attribute.

    The classifiers' rows have length 1: only states that lie apart are told apart.
    """

    def __init__(self, tower: CLIPTextModel):
        super().__init__()
        self.tower = tower
        self.was = copy.deepcopy(tower).eval().requires_grad_(False)
        width = tower.config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in CLASSES.items()})

    def losses(self, ids: Tensor, positions: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of padded token ids [B, T], read at `positions` [B]: what is told, and how far the states moved."""
        states, old = self.tower(ids)[0].float(), self.was(ids)[0].float()
        read = states[torch.arange(len(ids)), positions] - old.mean((0, 1))
        parts = [name_loss(self.heads[n], read, target) for n, target in targets.items()]
        return {"told": TOLD * torch.stack(parts).mean(), "moved": (states - old).square().mean()}


def train(budget: Budget, corpus: Corpus, folder: Path, tower: CLIPTextModel) -> tuple[CLIPTextModel, float]:
    """Train the text tower on, by captions alone."""
    torch.manual_seed(budget.seed)
    model, tokenizer = WithHeads(tower.train()), load_tokenizer()

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        indices = rng.integers(len(corpus), size=budget.batch_size)
        captions = corpus.captions(indices, rng, WEB_SHARE, LOOSE_SHARE)
        texts = [c.text for c in captions]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        ends = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
        positions = torch.from_numpy(rng.integers(ends.numpy(), ids.shape[1]))
        return model.losses(ids, positions, told(captions))

    seconds = fit(model, loss, budget, folder)
    return model.tower.eval(), seconds
