"""Rows of samples by method, by request and by swap: what tables take their means and differences over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moa.evaluation.statistics import Interval, interval

ORDER = ("prior", "moa", "moa_wrong_subject", "fastcomposer", "ceiling")  # others follow by name
METRICS = ("ip", "pc")  # that the tables of quality have of every image
Cells = Mapping[str, Any]  # values by column
Rows = Sequence[Cells]


def by_method(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of each method, the methods in the order of the tables."""
    names = sorted(
        {row["method"] for row in rows}, key=lambda m: (ORDER.index(m) if m in ORDER else len(ORDER), m)
    )
    return {name: [row for row in rows if row["method"] == name] for name in names}


def mean_of(rows: Rows, metric: str) -> Interval:
    """Mean over images of a column of samples, with its interval over subjects."""
    return interval([row[metric] for row in rows], [row["members"] for row in rows])


def request_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What methods are paired by: subject, prompt and index of an image."""
    return row["subject"], row["prompt_id"], row["index"]


def members_of(
    *methods: Rows, key: Callable[[Mapping[str, Any]], tuple[Any, ...]] = request_key
) -> dict[tuple[Any, ...], list[str]]:
    """On whose looks the rows of each request (or pair) depend, of all these methods."""
    members: dict[tuple[Any, ...], set[str]] = {}
    for row in (row for rows in methods for row in rows):
        members.setdefault(key(row), set()).update(row["members"])
    return {key: sorted(names) for key, names in members.items()}


def per_request(rows: Rows, metric: str) -> dict[tuple[Any, ...], float]:
    """A metric by request, averaged over training seeds, so that methods can be paired."""
    values: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        values.setdefault(request_key(row), []).append(row[metric])
    return {key: sum(v) / len(v) for key, v in values.items()}


def pair_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What swaps are paired by: both subjects, prompt and index of a `KEPT` row."""
    return row["subject"], row["other"], row["prompt_id"], row["index"]


def seeds_of(rows: Rows) -> set[int | None]:
    """Of which trainings there are rows; None stands for what was not trained."""
    return {row["train_seed"] for row in rows}
