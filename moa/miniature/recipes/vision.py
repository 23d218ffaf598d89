"""Teaching vision transformers what to see: linear heads that only training needs.

From captions alone a ViT trained for minutes learns colours and backgrounds, and hardly a mouth: one vector
has to gather what the words ask for before any patch is told what to look at. A linear head over all patch
tokens names the attributes straight away; what pools those tokens (a class token, BLIP-2's queries) then has
something to pool.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from moa.miniature import models
from moa.miniature.corpus import Corpus
from moa.miniature.world import APPEARANCE_ATTRIBUTES, ATTRIBUTES, BACKGROUND_ATTRIBUTES, IDENTITY_ATTRIBUTES

TOKENS = (models.IMAGE_SIZE // models.VISION["patch_size"]) ** 2  # patches of a picture
PAIRS = 0.5  # share of pictures with two figures in a batch: theirs are the small mouths
CONTEXT = ("class", *APPEARANCE_ATTRIBUTES)  # of a figure: what captions name
LOOKS = ("class", *IDENTITY_ATTRIBUTES, *APPEARANCE_ATTRIBUTES)  # of a figure: all but the prop
MARGIN = (1.0, 1.4)  # side of a crop around a figure, as a multiple of its box
SHIFT = 0.08  # at most this share of the side

Labels = dict[str, Tensor]  # class index [N] of each head; −1 where it says nothing


def scene_labels(corpus: Corpus) -> Labels:
    """What captions name of whole pictures: both figures' context, the prop, the background, a second one."""
    figures = [corpus.labels(0), corpus.labels(1)]
    targets = {f"{n}_{i}": torch.from_numpy(figures[i][n]) for n in (*CONTEXT, "prop") for i in range(2)}
    targets |= {n: torch.from_numpy(figures[0][n]) for n in BACKGROUND_ATTRIBUTES}
    return targets | {"second": (targets["class_1"] >= 0).long()}


def scene_heads(width: int) -> Heads:
    """Heads for `scene_labels`."""
    names = [f"{n}_{i}" for n in (*CONTEXT, "prop") for i in range(2)]
    sizes = {n: len(ATTRIBUTES[n.rsplit("_", 1)[0]]) for n in names}
    return Heads(width, sizes | {n: len(ATTRIBUTES[n]) for n in BACKGROUND_ATTRIBUTES} | {"second": 2})


def figure_heads(width: int) -> Heads:
    """Heads for `LOOKS`, of pictures of one figure."""
    return Heads(width, {n: len(ATTRIBUTES[n]) for n in LOOKS})


class Heads(nn.Module):
    """One linear classifier a name on features [B, width]."""

    def __init__(self, width: int, sizes: dict[str, int]):
        super().__init__()
        self.heads = nn.ModuleDict({n: nn.Linear(width, size) for n, size in sizes.items()})

    def loss(self, features: Tensor, targets: Labels) -> Tensor:
        """Mean over heads of the cross-entropy; a head without any target in the batch counts as 0."""
        losses = [
            F.cross_entropy(head(features).float(), targets[n], ignore_index=-1, reduction="sum")
            / (targets[n] >= 0).sum().clamp(min=1)
            for n, head in self.heads.items()
        ]
        return torch.stack(losses).mean()


def patches(hidden: Tensor) -> Tensor:
    """A vision tower's last hidden state [B, 1 + P, D], class token first → [B, P · D]."""
    return hidden[:, 1:].flatten(1)


def jitter(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Normalised pixels [B, 3, S, S], each picture shifted by up to 5 % and zoomed, all a little noisy."""
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.from_numpy(rng.uniform(0.92, 1.1, len(pixels))).float()
    theta[:, :, 2] = torch.from_numpy(rng.uniform(-0.1, 0.1, (len(pixels), 2))).float()
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, align_corners=False, padding_mode="border")
    return moved + torch.randn_like(moved) * 0.1 * float(rng.random())


def square(image: np.ndarray, box: tuple[int, int, int, int], rng: np.random.Generator) -> np.ndarray:
    """uint8 [S, S, 3]: a square of random size and place around a figure's box [x1, y1, x2, y2)."""
    x1, y1, x2, y2 = box
    side = max(x2 - x1, y2 - y1) * rng.uniform(*MARGIN)
    x, y = ((a + b) / 2 + rng.uniform(-SHIFT, SHIFT) * side for a, b in ((x1, x2), (y1, y2)))
    extent = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
    size = (models.IMAGE_SIZE, models.IMAGE_SIZE)
    picture = Image.fromarray(image)
    return np.asarray(picture.transform(size, Image.Transform.EXTENT, extent, Image.Resampling.BILINEAR))
