"""Where the persons of generated images are, for masks and, if the config says so, for boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moa.data.segment import Segmentation, SegmentConfig, Segmenter

Masks = NDArray[np.bool_]


@dataclass(frozen=True)
class Persons:
    """The persons of an image, the largest first."""

    masks: Masks  # [N, H, W]
    scores: NDArray[np.float64]  # [N], 0..1

    @property
    def union(self) -> Masks:
        """[H, W]: pixels that belong to anyone."""
        return np.asarray(self.masks.any(axis=0))


class PersonFinder:
    """The annotation stage's segmenter, for images of any sizes, without specks."""

    def __init__(self, config: SegmentConfig, min_area: float = 0.01):
        """`min_area`: least area of a person, as a fraction of the image. Raises DataError as `Segmenter`."""
        self.segmenter, self.min_area = Segmenter(config), min_area

    def __call__(self, images: Sequence[Image.Image]) -> list[Persons]:
        """The persons of RGB images; nobody is an empty stack, not an error."""
        found: dict[int, Persons] = {}
        for size in {image.size for image in images}:
            same = [index for index, image in enumerate(images) if image.size == size]
            segmented = self.segmenter([images[index] for index in same])
            found.update({index: self._persons(s) for index, s in zip(same, segmented, strict=True)})
        return [found[index] for index in range(len(images))]

    def _persons(self, found: Segmentation) -> Persons:
        kept = [s for s in found.segments if s["area"] >= self.min_area * found.mask.size]
        kept.sort(key=lambda s: -s["area"])
        masks = [found.mask == s["segment_id"] for s in kept]
        stack = np.stack(masks) if masks else np.zeros((0, *found.mask.shape), dtype=bool)
        return Persons(stack, np.array([s["score"] for s in kept], dtype=float))
