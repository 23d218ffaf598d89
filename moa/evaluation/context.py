"""Context kept while the subject is swapped: PSNR, SSIM, LPIPS outside both subjects, same seed and prompt.

Generated images have no true mask, so the segmenter's is taken: the union of the persons of both images,
dilated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Distance = Callable[[Pixels, Pixels], NDArray[np.float64]]  # a map [H, W] of two images [H, W, 3]

ROUNDING = 1 / 12  # variance of rounding to whole grey levels: no difference below it is believed
LEAST_OUTSIDE = 0.05  # fraction of the image; with less left to compare, a number would say nothing


@dataclass(frozen=True)
class Kept:
    """How alike two images are outside their subjects."""

    psnr: float  # dB, at most 58.9 (two equal images)
    ssim: float  # -1..1
    lpips: float | None  # 0 = equal; None where its weights are not there
    outside: float  # fraction of the pixels that were compared


def dilate(mask: Mask, fraction: float) -> Mask:
    """A mask [H, W] grown on all sides by `fraction` of the image's longer side, at least one pixel."""
    if not mask.any():
        return mask.copy()  # there is nothing to be far from
    radius = max(1, round(fraction * max(mask.shape)))
    return np.asarray(ndimage.distance_transform_edt(~mask) <= radius)


def psnr(one: Pixels, other: Pixels, where: Mask) -> float:
    """Peak signal-to-noise ratio in dB of two [H, W, 3] images over the true pixels of [H, W]."""
    error = (one.astype(float) - other.astype(float))[where]
    return 10 * math.log10(255**2 / max(float(np.mean(error**2)), ROUNDING))


def ssim(one: Pixels, other: Pixels, where: Mask) -> float:
    """Structural similarity, -1..1, of two [H, W, 3] images over the true pixels of [H, W].

    Wang et al. 2004: Gaussian window of sigma 1.5 cut at 3.5 sigma, K1 = 0.01, K2 = 0.03, population
    variances; mean over colours. A window's weights are those of its true pixels, so that nothing else has a
    part in it.
    """
    x, y = one.astype(float), other.astype(float)
    inside = where[..., None].astype(float)

    def window(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return ndimage.gaussian_filter(values, sigma=(1.5, 1.5, 0), truncate=3.5)[where]

    def blur(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return window(values * inside) / window(inside)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    similarity = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(similarity.mean())


def kept(one: Pixels, other: Pixels, subjects: Mask, lpips: Distance | None = None) -> Kept | None:
    """Compare two images outside `subjects` [H, W]; None if less than `LEAST_OUTSIDE` of it is left."""
    outside = ~subjects
    if outside.mean() < LEAST_OUTSIDE:
        return None
    distance = None if lpips is None else float(lpips(one, other)[outside].mean())
    return Kept(psnr(one, other, outside), ssim(one, other, outside), distance, float(outside.mean()))


def swaps(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Pairs of rows that differ in their subjects only: same method, prompt text, seed, index and training.

    Rows whose class word differs have another prompt, hence are no swap. Ordered by subject, so (a, b) is
    never also (b, a).
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = ("method", "train_seed", "split", "kind", "prompt", "index", "seed")
        groups.setdefault(tuple(row[name] for name in key), []).append(row)
    return [
        pair
        for group in groups.values()
        for pair in combinations(sorted(group, key=lambda row: row["subject"]), 2)
    ]
