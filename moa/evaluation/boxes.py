"""Boxes around the faces or persons of an image, and what is inside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Detection:
    """The faces (or persons) of an image, the largest first."""

    boxes: Floats  # [N, 4]: x1, y1, x2, y2 in pixels, inside the image
    scores: Floats  # [N], 0..1


def tidy(boxes: Floats, scores: Floats, size: tuple[int, int]) -> Detection:
    """Boxes cut to an image of (width, height), without empty ones, the largest first."""
    width, height = size
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4).clip(0, [width, height, width, height])
    scores = np.asarray(scores, dtype=float).reshape(-1)
    whole = boxes.astype(int)
    real = (whole[:, 2] > whole[:, 0]) & (whole[:, 3] > whole[:, 1])
    boxes, scores = boxes[real], scores[real]
    order = np.argsort(-areas(boxes), kind="stable")
    return Detection(boxes[order], scores[order])


def areas(boxes: Floats) -> Floats:
    """Areas [N] of boxes [N, 4], in square pixels."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def crop(image: Image.Image, box: Sequence[float]) -> Image.Image:
    """The part of an image inside a box, whose corners are rounded towards zero (as facenet-pytorch does)."""
    left, top, right, bottom = (int(side) for side in box)
    return image.crop((left, top, right, bottom))
