"""Choosing among things: some of many, and one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items from all over a sequence, in order."""
    number = min(count, len(items))
    return [items[i * len(items) // number] for i in range(number)]


def greedy_pairs(scores: NDArray[Any]) -> list[tuple[int, int]]:
    """(row, column) pairs of [R, C] scores: the best first, then of the rest, until one side ends.

    On a tie the first in reading order wins.
    """
    left = np.array(scores, dtype=float)
    pairs = []
    for _ in range(min(left.shape)):
        row, column = np.unravel_index(np.argmax(left), left.shape)
        pairs.append((int(row), int(column)))
        left[row, :] = left[:, column] = -np.inf
    return pairs
