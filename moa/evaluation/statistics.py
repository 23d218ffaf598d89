"""Means with 95 % intervals whose unit is the subject, not the image.

Images of a subject resemble one another, and so do pairs that share a member. The variance of a plain mean is
therefore summed over all pairs of images that share a subject ("dyadic cluster-robust", Aronow, Samii and
Assenova 2015, https://doi.org/10.1093/pan/mpv018); for single subjects this is the usual cluster-robust one:

    V = 1/N² Σ_{i,j sharing a subject} e_i e_j / (1 − s),    e = x − mean,
    s = the share of all N² pairs (i, j) that share a subject.

1 − s undoes the shrinking of residuals by the estimated mean, exactly so when images are exchangeable; for G
subjects with equally many images it is the familiar factor G/(G − 1). Intervals are mean ± t · √V, as 15
clusters are few: a percentile bootstrap would cover about 91 %. The degrees of freedom are Satterthwaite's,
tr(Q)²/tr(Q²), for V = uᵀQu were images the sums of independent normal effects u of their subjects: G − 1 for
balanced single subjects and for all pairs, fewer for sparse pairs.

A ratio has Fieller's limits by the same variance, a slope those of a jackknife over subjects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence limits; the limits are NaN where there are too few subjects for any."""

    mean: float
    low: float
    high: float


def sharing(members: Sequence[Sequence[str]]) -> tuple[NDArray[np.intp], Floats]:
    """Who is in an image with whom.

    Args:
        members: the subjects of each of N images.

    Returns:
        group [N], the index of each image's set of subjects; and incidence [D, G], who is in which set.
    """
    sets = [frozenset(m) for m in members]
    if not all(sets):
        raise ValueError("every image needs a subject to belong to")
    distinct = sorted(set(sets), key=sorted)
    names = sorted(set().union(*distinct))
    position = {members: index for index, members in enumerate(distinct)}
    incidence = np.array([[name in group for name in names] for group in distinct], dtype=float)
    return np.array([position[s] for s in sets], dtype=np.intp), incidence


def degrees_of_freedom(counts: Floats, incidence: Floats, share: Floats) -> float:
    """Satterthwaite's degrees of freedom of V, 1..G−1, for counts [D] of images a set (module docstring)."""
    centred = counts[:, None] * (incidence - counts @ incidence / counts.sum())
    q = centred.T @ share @ centred
    return float(np.clip(np.trace(q) ** 2 / np.sum(q * q), 1, incidence.shape[1] - 1))


def margins(
    values: ArrayLike, members: Sequence[Sequence[str]], level: float = 0.95
) -> tuple[Floats, list[Floats]]:
    """Means of R quantities measured on the same N images, and how far from them the truth may lie.

    Args:
        values: [N, R], finite.
        members: the subjects of each image.
        level: coverage, 0..1.

    Returns:
        mean [R]; and two matrices [R, R], t² times the means' covariance by the two estimates of which the
        larger counts (module docstring): the dyadic one, and that of independent sets of subjects, below
        which the first is noise (it can even turn negative) and not believed. They are NaN where fewer than
        two independent subjects (or no two disjoint pairs) exist.

    Raises:
        ValueError: no images, or a value that is not finite.
    """
    x = np.asarray(values, dtype=float)
    if x.ndim != 2 or not len(x) or len(x) != len(members):
        raise ValueError(f"values must be [N, R] for {len(members)} >= 1 images, not {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("a value is not finite; leave that image out and say so, or mend its score")
    group, incidence = sharing(members)
    share = (incidence @ incidence.T > 0).astype(float)
    mean = x.mean(axis=0)
    counts = np.bincount(group, minlength=len(share)).astype(float)
    sums = np.zeros((len(share), x.shape[1]))
    np.add.at(sums, group, x - mean)
    shrink = 1 - counts @ share @ counts / len(x) ** 2
    if shrink < 1e-9:
        return mean, [np.full((len(mean), len(mean)), np.nan)] * 2
    quantile = stats.t.ppf((1 + level) / 2, degrees_of_freedom(counts, incidence, share))
    scale = (quantile / len(x)) ** 2
    dyadic = sums.T @ (share @ sums) / shrink
    independent = sums.T @ sums / (1 - (counts**2).sum() / len(x) ** 2)
    return mean, [scale * dyadic, scale * independent]


def cluster_intervals(
    values: ArrayLike, members: Sequence[Sequence[str]], level: float = 0.95
) -> tuple[Floats, Floats, Floats]:
    """Means and confidence limits, each [R], of R quantities measured on the same N images: see `margins`."""
    mean, (dyadic, independent) = margins(values, members, level)
    half = np.sqrt(np.maximum(np.diag(dyadic), np.diag(independent)))
    return mean, mean - half, mean + half


def interval(values: ArrayLike, members: Sequence[Sequence[str]], level: float = 0.95) -> Interval:
    """`cluster_intervals` for one quantity, values [N]."""
    mean, low, high = cluster_intervals(np.asarray(values, dtype=float)[:, None], members, level)
    return Interval(float(mean[0]), float(low[0]), float(high[0]))


def difference(
    values: Mapping[Any, float], reference: Mapping[Any, float], members: Mapping[Any, Sequence[str]]
) -> Interval:
    """Mean paired difference values − reference, over keys (one an image: who, which prompt, which index).

    Raises:
        ValueError: the two were not measured for the same keys.
    """
    if set(values) != set(reference):
        odd = sorted(set(values) ^ set(reference), key=str)
        raise ValueError(
            f"cannot pair: {len(odd)} images are on one side only, such as {odd[0]}; make them all"
        )
    keys = sorted(values)
    return interval([values[k] - reference[k] for k in keys], [members[k] for k in keys])


def ratio(numerator: ArrayLike, denominator: ArrayLike, members: Sequence[Sequence[str]]) -> Interval:
    """mean(numerator) / mean(denominator) of paired values [N], with Fieller's limits (1954).

    They are the least and the greatest of the ratios ρ for which the interval of mean(numerator − ρ ·
    denominator) holds 0. So if the limits lie above a bound, and the denominator above 0, that difference is
    above 0 for the bound. The reverse holds as well, unless the dyadic estimate is negative at the ratio
    itself: then these ρ may leave a gap, which counts as held, so that the limits are wider than need be.
    NaN where the denominator's own interval reaches 0, for then any ratio may be true.

    Raises:
        ValueError: the denominator's mean is zero.
    """
    values = np.stack([np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)], axis=1)
    (a, b), parts = margins(values, members)
    if b == 0:
        raise ValueError("the denominator's mean is zero, so the ratio says nothing")
    value = float(a / b)
    if not all(b * b > part[1, 1] for part in parts):
        return Interval(value, float("nan"), float("nan"))
    ends = [value, *(end for part in parts for end in fieller(a, b, part))]
    return Interval(value, min(ends), max(ends))


def fieller(a: float, b: float, margin: Floats) -> list[float]:
    """Both ends of the ratios ρ with (a − ρ b)² ≤ the margin [2, 2] of a − ρ b; [] if there are none.

    b² must be above its own margin.
    """
    square, product, rest = b * b - margin[1, 1], a * b - margin[0, 1], a * a - margin[0, 0]
    under = product**2 - square * rest
    return [float((product + sign * np.sqrt(under)) / square) for sign in (-1, 1)] if under >= 0 else []


def slopes(kept: NDArray[np.bool_], x: Floats, y: Floats, groups: Floats) -> Floats:
    """Slopes [K] of y [N] on x [N] by least squares, of the images that `kept` [K, N] says.

    Each of the groups, of which `groups` [N, S] says who is in which, has means of its own. NaN where x does
    not vary.
    """
    weights = kept.astype(float)
    counts = np.maximum(weights @ groups, 1)
    mean = (weights * x) @ groups / counts
    above = weights @ (x * y) - np.sum(mean * ((weights * y) @ groups), axis=1)
    below = weights @ (x * x) - np.sum(mean**2 * counts, axis=1)
    return above / np.where(below > 1e-9 * (x @ x), below, np.nan)


def slope(
    x: ArrayLike, y: ArrayLike, members: Sequence[Sequence[str]], groups: Sequence[str] | None = None
) -> Interval:
    """Slope of y [N] on x [N] by least squares, with the 95 % limits of a jackknife over subjects.

    Subjects with unusual x pull the line to themselves, so their residuals say too little of what it may be;
    the slopes without each of them do not. Deviations from the slope of all, scaled as for a mean of G
    subjects, √((G − 1)/G Σ), times t of G − 1. NaN where without somebody x does not vary.

    Args:
        x: [N].
        y: [N].
        members: the subjects of each image.
        groups: of each image, if groups have means of their own (a line through each, with one slope).

    Raises:
        ValueError: x does not vary, within the groups.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    own_group = np.asarray(groups or [""] * len(a))
    inside = (own_group[:, None] == np.unique(own_group)).astype(float)
    names = sorted(set().union(*members))
    without = np.array([[name not in group for group in members] for name in names])
    everyone = np.ones((1, len(a)), bool)
    value, *others = slopes(np.vstack([everyone, without]), a - a.mean(), b - b.mean(), inside)
    if np.isnan(value):
        raise ValueError("x does not vary, so there is no slope")
    count = len(names)
    spread = np.sqrt((count - 1) / count * np.sum((np.array(others) - value) ** 2))
    half = stats.t.ppf(0.975, count - 1) * spread if count > 1 else np.nan
    return Interval(float(value), float(value - half), float(value + half))
