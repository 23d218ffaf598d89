"""How far trainings that differ in their seed alone lie apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from moa.evaluation.groups import (
    METRICS,
    Rows,
    by_method,
    mean_of,
    members_of,
    pair_of,
    per_request,
    seeds_of,
)
from moa.evaluation.statistics import difference, interval
from moa.evaluation.table import Table, limits
from moa.trained import TRAINED

SEEDS = (
    "kind",
    "metric",
    "method",
    "minus",
    "trainings",
    "value",
    "value_low",
    "value_high",
    "least",
    "most",
    "sd",
)


def trainings(rows: Rows, kind: str) -> Table:
    """How far trainings with different seeds lie apart: each method's mean, and each difference of two.

    value has the interval over subjects, as everywhere; least, most and sd are over the trainings' means, of
    a difference over all choices of a training of either, with the root of the two variances' sum as sd. Two
    methods that use the same weights are compared training by training.
    """
    methods = by_method(rows)
    table: list[dict[str, Any]] = []
    for metric in METRICS:
        means = {method: _means_of_trainings(own, metric) for method, own in methods.items()}
        for method in methods:
            if len(means[method]) > 1:
                row = {"kind": kind, "metric": metric, "method": method, "trainings": len(means[method])}
                spread = _spread(list(means[method].values()))
                table.append(row | limits("value", mean_of(methods[method], metric)) | spread)
        for reference, method in combinations(methods, 2):
            if max(len(means[method]), len(means[reference])) > 1:
                own, other = (per_request(methods[name], metric) for name in (method, reference))
                row = {"kind": kind, "metric": metric, "method": method, "minus": reference}
                members = members_of(methods[method], methods[reference])
                value = limits("value", difference(own, other, members))
                table.append(row | value | _spread_apart(means, method, reference))
    notes = (
        "value: mean over images, with its 95 % interval over subjects. least, most: of the means of "
        "trainings that differ in their seed alone; of a difference, of all choices of one of either method, "
        "or of each training of two methods that share theirs. sd: their standard deviation.",
    )
    return Table(SEEDS, table, notes)


def trainings_of_swaps(rows: Rows) -> Table:
    """Likewise of the context kept under a swap, from `KEPT` rows: pairs with a value in every training."""
    table: list[dict[str, Any]] = []
    for metric in ("psnr", "ssim"):
        for method, own in by_method(rows).items():
            seeds = seeds_of(own)
            pairs: dict[tuple[Any, ...], dict[int | None, float]] = {}
            for row in own:
                if row[metric] is not None:
                    pairs.setdefault(pair_of(row), {})[row["train_seed"]] = row[metric]
            whole = {pair: found for pair, found in pairs.items() if found.keys() == seeds}
            if len(seeds) > 1 and whole:
                members = {pair_of(row): row["members"] for row in own}
                value = interval(
                    [statistics.mean(found.values()) for found in whole.values()],
                    [members[pair] for pair in whole],
                )
                means = [statistics.mean(found[seed] for found in whole.values()) for seed in seeds]
                about = {"kind": "swap", "metric": f"swap_{metric}", "method": method}
                table.append(about | {"trainings": len(seeds)} | limits("value", value) | _spread(means))
    return Table(SEEDS, table)


def _means_of_trainings(rows: Rows, metric: str) -> dict[int | None, float]:
    """The mean of each training by its seed; of one that was not trained, its only one."""
    groups: dict[int | None, list[float]] = {}
    for row in sorted(rows, key=lambda row: -1 if row["train_seed"] is None else row["train_seed"]):
        groups.setdefault(row["train_seed"], []).append(row[metric])
    return {seed: sum(values) / len(values) for seed, values in groups.items()}


def _spread_apart(means: Mapping[str, Mapping[int | None, float]], method: str, minus: str) -> dict[str, Any]:
    """trainings, least, most and sd of the differences of two methods."""
    own, other = means[method], means[minus]
    if TRAINED.get(method, method) == TRAINED.get(minus, minus) and own.keys() == other.keys():
        paired = [own[seed] - other[seed] for seed in own]
        return {"trainings": len(paired)} | _spread(paired)
    values = list(own.values()), list(other.values())
    return {"trainings": len(own) * len(other)} | _spread(*values)


def _spread(means: Sequence[float], minus: Sequence[float] = (0.0,)) -> dict[str, float]:
    """least, most and sd of the differences of two methods' trainings."""
    every = [one - other for one in means for other in minus]
    variances = [statistics.variance(part) for part in (means, minus) if len(part) > 1]
    return {"least": min(every), "most": max(every), "sd": math.sqrt(sum(variances))}
