"""Find people in photos with a panoptic segmenter (Mask2Former, MaskFormer).

Entry point, called by `python -m moa segment`:

    run(config, raw, output)      raw shards → as many segment shards, a row for every photo

`Segmenter` is also the detector of miniature evaluations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

from moa.data.annotators import (
    DTYPES,
    Precision,
    annotate,
    check_positive,
    check_workers,
    load,
    paired,
    pixel_values,
    revision,
)
from moa.data.errors import DataError
from moa.data.records import RAW, SEGMENT, IdMap, Row, bounding_box, encode_mask, read_rows, write_rows
from moa.methods import ModelSource


@dataclass(frozen=True)
class SegmentConfig:
    """What counts as a person (thresholds: Mask2Former's panoptic inference)."""

    model: ModelSource  # any model of AutoModelForUniversalSegmentation with its image processor
    batch_size: int = 64  # photos a pass
    label: str = "person"  # the only label that is kept, as in the model's id2label
    threshold: float = 0.8  # least class probability of a segment [Mask2Former]
    mask_threshold: float = 0.5  # least probability of a pixel [Mask2Former]
    overlap: float = 0.8  # least share of a segment's pixels that no other segment claims [Mask2Former]
    precision: Precision = "no"  # "no" = 32-bit floats
    workers: int = 0  # processes that decode and resize ahead of the model
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_workers(self)
        check_positive(self, "batch_size")
        for name in ("threshold", "mask_threshold", "overlap"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in 0..1, below 1, not {getattr(self, name)}")

    @property
    def settings(self) -> dict[str, Any]:
        """What besides the model decides the masks; recorded in every row."""
        names = ("label", "threshold", "mask_threshold", "overlap", "precision")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Segmentation:
    """The people of one photo, numbered 1, 2, … from left to right."""

    mask: IdMap  # [H, W], 0 = nobody
    segments: list[Row] = field(default_factory=list)  # segment_id, label, score, bbox, area


CPU_PIXELS = 2**18  # of a pass on a CPU; with more, a batch takes longer than its photos one by one


def panoptic(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    size: tuple[int, int],
    threshold: float,
    mask_threshold: float,
    overlap: float,
) -> list[tuple[int, float, torch.Tensor]]:
    """Segments (label, score, pixels [H, W] bool), disjoint, from one image's queries (Mask2Former, sec. 3).

    `class_logits` is [Q, labels + 1], the last column "nothing"; `mask_logits` [Q, h, w]. Only logits are
    interpolated, straight to `size` = (H, W). Unlike transformers' post-processing, which goes through
    384 × 384 and hands a segment every pixel that no other one wants, pixels must pass `mask_threshold`.
    """
    scores, labels = class_logits.float().softmax(-1).max(-1)
    keep = (labels != class_logits.shape[-1] - 1) & (scores > threshold)
    if not keep.any():
        return []
    scores, labels = scores[keep], labels[keep]
    claimed, owner = _claims(scores, mask_logits[keep], size, mask_threshold)
    found = []
    for query, (score, label) in enumerate(zip(scores.tolist(), labels.tolist(), strict=True)):
        pixels = claimed[query] & (owner == query)
        if pixels.any() and pixels.sum() >= overlap * claimed[query].sum():
            found.append((int(label), float(score), pixels))
    return found


def _claims(
    scores: torch.Tensor, mask_logits: torch.Tensor, size: tuple[int, int], mask_threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels that each query claims, [Q, H, W] bool, and the surest query of each pixel, [H, W].

    Query by query, since probabilities of all at a photo's own size would not fit in memory.
    """
    claimed = torch.empty((len(scores), *size), dtype=torch.bool, device=scores.device)
    owner = torch.zeros(size, dtype=torch.int32, device=scores.device)
    surest = torch.full(size, -1.0, device=scores.device)
    for query, (score, logits) in enumerate(zip(scores, mask_logits[:, None, None].float(), strict=True)):
        enlarged = interpolate(logits, size=size, mode="bilinear", align_corners=False)
        probabilities = enlarged[0, 0].sigmoid()
        claimed[query] = probabilities >= mask_threshold
        sure = score * probabilities
        owner[sure > surest] = query
        surest = torch.maximum(surest, sure)
    return claimed, owner


def at_once(pixels: torch.Tensor) -> int:
    """How many photos of [B, 3, H, W] a pass looks at: all, on a CPU as many as its caches hold."""
    return len(pixels) if pixels.device.type != "cpu" else max(1, CPU_PIXELS // pixels[0, 0].numel())


class Segmenter:
    """A loaded segmenter: images in, people out. DataError if it cannot be loaded or lacks the label."""

    def __init__(self, config: SegmentConfig) -> None:
        self.config = config
        self.processor = load(AutoImageProcessor, config.model, "segmenter")
        self.prepare = partial(pixel_values, self.processor)
        model = load(
            AutoModelForUniversalSegmentation, config.model, "segmenter", dtype=DTYPES[config.precision]
        )
        self.model = model.to(config.device).eval()
        self.revision = revision(config.model, model)
        names = {int(index): name for index, name in model.config.id2label.items()}
        if config.label not in names.values():
            known = ", ".join(list(names.values())[:10])
            raise DataError(f"label {config.label!r} is unknown to {config.model.id}; it knows {known}, …")
        self.person = {index for index, name in names.items() if name == config.label}

    def __call__(self, images: Sequence[Image.Image]) -> list[Segmentation]:
        """The people of RGB images of one size. Raises DataError for images of several sizes."""
        if len({image.size for image in images}) > 1:
            raise DataError("images of one call must have the same size; call once for each size")
        return list(self.look(self.prepare(images), [(image.height, image.width) for image in images]))

    @torch.inference_mode()
    def look(self, pixels: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> Iterator[Segmentation]:
        """The same of what `prepare` made of images of these sizes, (height, width), one after the other."""
        pixels = pixels.to(self.config.device, DTYPES[self.config.precision])
        outputs = [self.model(pixel_values=part) for part in pixels.split(at_once(pixels))]
        classes = torch.cat([output.class_queries_logits for output in outputs])
        masks = torch.cat([output.masks_queries_logits for output in outputs])
        return map(self._people, classes, masks, sizes)

    @torch.inference_mode()
    def _people(self, classes: torch.Tensor, masks: torch.Tensor, size: tuple[int, int]) -> Segmentation:
        config = self.config
        found = panoptic(classes, masks, size, config.threshold, config.mask_threshold, config.overlap)
        people = [(score, pixels.cpu().numpy()) for label, score, pixels in found if label in self.person]
        people.sort(key=lambda person: (_middle(person[1]), -person[0]))
        ids = np.zeros(size, np.int32)
        segments = []
        for number, (score, pixels) in enumerate(people, start=1):
            ids[pixels] = number
            segments.append(
                {
                    "segment_id": number,
                    "label": config.label,
                    "score": score,
                    "bbox": bounding_box(pixels),
                    "area": int(pixels.sum()),
                }
            )
        return Segmentation(ids, segments)


def _middle(pixels: np.ndarray) -> float:
    """Mean column of the true pixels."""
    return float(np.nonzero(pixels)[1].mean())


def segments(segmenter: Segmenter, photos: Sequence[Row], title: str) -> list[Row]:
    """A row of `SEGMENT` for each photo; masks are encoded as they come, and their pixels given up."""
    config = segmenter.config
    found: dict[str, Row] = {}
    for name, people, problem in annotate(segmenter, photos, config.batch_size, config.workers, title):
        found[name] = {
            "mask": encode_mask(people.mask) if people else None,
            "segments": people.segments if people else [],
            "problem": problem,
        }
    made_by = {
        "model": config.model.id,
        "revision": segmenter.revision,
        "settings": json.dumps(config.settings, sort_keys=True),
    }
    return [{"id": photo["id"]} | found[photo["id"]] | made_by for photo in photos]


def run(config: SegmentConfig, raw: Sequence[Path], output: Sequence[Path]) -> None:
    """Find the people of raw shards, each shard's in the table of its place; the model is loaded once.

    Raises DataError for a bad shard or model, ValueError unless there are as many tables as shards.
    """
    shards = paired(raw, output)
    segmenter = Segmenter(config)
    for shard, table in shards:
        write_rows(table, segments(segmenter, read_rows(shard, RAW), f"segment {shard.stem}"), SEGMENT)
