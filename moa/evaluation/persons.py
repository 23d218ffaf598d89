"""Where the persons are: a panoptic segmenter behind one call, for masks and, if the config says so, for boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

Masks = NDArray[np.bool_]


@dataclass(frozen=True)
class Segments:
    """The persons of an image, the largest first."""

    masks: Masks  # [N, H, W]
    scores: NDArray[np.float64]  # [N], 0..1

    @property
    def union(self) -> NDArray[np.bool_]:
        """[H, W]: pixels that belong to anyone."""
        return self.masks.any(axis=0)


class PersonSegmenter:
    """A MaskFormer or Mask2Former, asked for one label."""

    def __init__(
        self,
        id: str,
        revision: str | None = None,
        label: str = "person",
        threshold: float = 0.5,
        min_area: float = 0.01,
        device: str = "cpu",
    ):
        """Load a segmenter.

        Args:
            id, revision: local folder, or hub name and commit.
            label: name of the wanted class in the model's `id2label`.
            threshold: least score of a segment, 0..1.
            min_area: least area of a segment, as a fraction of the image.

        Raises:
            OSError: no such model. ValueError: it does not know the label.
        """
        self.processor = AutoImageProcessor.from_pretrained(id, revision=revision)
        self.model = AutoModelForUniversalSegmentation.from_pretrained(id, revision=revision).to(device).eval()
        names = {int(k): str(v) for k, v in self.model.config.id2label.items()}
        self.labels = {number for number, name in names.items() if name == label}
        if not self.labels:
            raise ValueError(f"segmenter {id} knows no label {label!r}; it has {', '.join(names.values())}")
        self.threshold, self.min_area, self.device = threshold, min_area, device

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[Segments]:
        """The persons of RGB images of any sizes; none is an empty stack, not an error."""
        if not images:
            return []
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.device)
        output = self.model(pixel_values=inputs["pixel_values"], pixel_mask=inputs.get("pixel_mask"))
        found = self.processor.post_process_panoptic_segmentation(
            output,
            threshold=self.threshold,
            label_ids_to_fuse=set(),
            target_sizes=[(image.height, image.width) for image in images],
        )
        return [self._persons(image, result) for image, result in zip(images, found, strict=True)]

    def _persons(self, image: Image.Image, result: dict) -> Segments:
        ids = np.asarray(result["segmentation"].cpu()).reshape(image.height, image.width)
        wanted = [s for s in result["segments_info"] if s["label_id"] in self.labels]
        pairs = [(ids == s["id"], float(s["score"])) for s in wanted]
        pairs = [(m, score) for m, score in pairs if m.sum() >= max(1, self.min_area * m.size)]
        pairs.sort(key=lambda pair: -pair[0].sum())
        masks = np.stack([m for m, _ in pairs]) if pairs else np.zeros((0, *ids.shape), dtype=bool)
        return Segments(masks, np.array([score for _, score in pairs]))
