"""The judges: an identity network (ArcFace) and an attribute classifier, both small ResNets on figure crops.

They share nothing with the subject encoder or the text encoder, and see other pictures of other people than
those that they judge.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetForImageClassification, ResNetModel

from moa.miniature import models
from moa.miniature.corpus import Corpus
from moa.miniature.fit import Budget, fit
from moa.miniature.world import ATTRIBUTES, IDENTITY_ATTRIBUTES

MARGIN, SCALE = 0.3, 24.0  # ArcFace's additive angle (radians) and its temperature
FIGURE_ATTRIBUTES = tuple(n for n in ATTRIBUTES if not n.startswith("background"))


def box(mask: np.ndarray, figure: int) -> tuple[int, int, int, int] | None:
    """The box [x1, y1, x2, y2) of a figure; None where nothing of it is seen."""
    ys, xs = np.nonzero(mask == figure + 1)
    return (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1) if len(xs) else None


def crop(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """uint8 crop [size, size, 3]: the box squeezed to a square, as the evaluation does."""
    return np.asarray(Image.fromarray(image).crop(box).resize((size, size), Image.Resampling.BILINEAR))


class Figures:
    """Every figure of a corpus as a crop, made once: images [M, S, S, 3] in 0..255, and indices [M]."""

    def __init__(self, corpus: Corpus, size: int = models.JUDGE_SIZE):
        rows = [
            (i, f, b)
            for i, scene in enumerate(corpus.scenes)
            for f in range(len(scene.identities))
            if (b := box(corpus.masks[i], f)) is not None
        ]
        self.scene = np.array([r[0] for r in rows])
        self.figure = np.array([r[1] for r in rows])
        self.images = np.stack([crop(corpus.images[i], b, size) for i, _, b in rows])
        self.identity = [corpus.scenes[i].identities[f].id for i, f, _ in rows]
        by_figure = [corpus.labels(0), corpus.labels(1)]
        self.labels = {name: np.array([by_figure[f][name][i] for i, f, _ in rows]) for name in ATTRIBUTES}

    def __len__(self) -> int:
        return len(self.scene)


def augment(images: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Normalised pixels of crops [B, 3, S, S], shifted by up to 5 %, flipped, sometimes blurred or noisy."""
    x = models.judge_pixels(images)
    size = x.shape[-1]
    if rng.random() < 0.5:
        x = x.flip(-1)
    theta = torch.eye(2, 3).repeat(len(x), 1, 1)
    theta[:, :, 2] = torch.from_numpy(rng.uniform(-0.1, 0.1, (len(x), 2))).float()
    theta[:, 0, 0] = theta[:, 1, 1] = torch.from_numpy(rng.uniform(0.9, 1.12, len(x))).float()
    x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
    if rng.random() < 0.5:  # generated pictures are softer than rendered ones
        small = int(size * rng.uniform(0.35, 0.8))
        x = F.interpolate(F.interpolate(x, small, mode="area"), size, mode="bilinear")
    return x + torch.randn_like(x) * 0.1 * float(rng.random())


class ArcFace(nn.Module):
    """Embedder with the heads that only training needs: identities with a margin, and attributes."""

    def __init__(self, embedder: ResNetModel, identities: int):
        super().__init__()
        width = models.EMBEDDING
        self.embedder = embedder
        self.centres = nn.Parameter(torch.randn(identities, width) * 0.05)
        self.attributes = nn.ModuleDict(
            {n: nn.Linear(width, len(ATTRIBUTES[n])) for n in IDENTITY_ATTRIBUTES}
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.embedder(x).pooler_output.flatten(1).float()

    def identity_loss(self, features: Tensor, identity: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(features), F.normalize(self.centres)).clamp(-1 + 1e-6, 1 - 1e-6)
        rows = torch.arange(len(identity))
        target = (cosine[rows, identity].acos() + MARGIN).cos()
        return F.cross_entropy(SCALE * cosine.index_put((rows, identity), target), identity)


def train_identity(budget: Budget, corpus: Corpus, folder: Path) -> tuple[ResNetModel, float]:
    """ArcFace over the pretraining identities, with attribute heads as a second task."""
    torch.manual_seed(budget.seed)
    figures = Figures(corpus)
    names = sorted(set(figures.identity))
    identity = torch.tensor([names.index(n) for n in figures.identity])
    model = ArcFace(models.embedder(), len(names))

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        i = rng.integers(len(figures), size=budget.batch_size)
        features = model(augment(figures.images[i], rng))
        named = {
            n: F.cross_entropy(head(features), torch.from_numpy(figures.labels[n][i]))
            for n, head in model.attributes.items()
        }
        ramp = min(1.0, step / (0.3 * budget.steps))  # attributes first: 4,000 classes are slow to begin with
        return {
            "identity": ramp * model.identity_loss(features, identity[torch.from_numpy(i)]) / 4,
            "attributes": torch.stack(list(named.values())).mean(),
        }

    seconds = fit(model, loss, budget, folder)
    return model.embedder.eval(), seconds


def train_attributes(
    budget: Budget, corpus: Corpus, folder: Path
) -> tuple[ResNetForImageClassification, float]:
    """One classifier for all attributes: single-figure pictures for the background, crops for the rest."""
    torch.manual_seed(budget.seed)
    figures = Figures(corpus)
    single = np.array([i for i, s in enumerate(corpus.scenes) if len(s.identities) == 1])
    whole, size = corpus.labels(0), models.JUDGE_SIZE
    model = models.attribute_classifier()

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        half = budget.batch_size // 2
        i, j = rng.choice(single, half), rng.integers(len(figures), size=half)
        pictures = np.stack(
            [np.asarray(Image.fromarray(corpus.images[k]).resize((size, size), 2)) for k in i]
        )
        logits = models.split_logits(
            model(augment(np.concatenate([pictures, figures.images[j]]), rng)).logits
        )
        losses = {}
        for name in ATTRIBUTES:
            crops = figures.labels[name][j] if name in FIGURE_ATTRIBUTES else np.full(half, -100)
            target = torch.from_numpy(np.concatenate([whole[name][i], crops]))
            losses[name] = F.cross_entropy(logits[name].float(), target, ignore_index=-100) / len(ATTRIBUTES)
        return losses

    seconds = fit(model, loss, budget, folder)
    return model.eval(), seconds
