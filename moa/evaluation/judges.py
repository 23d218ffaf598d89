"""The models that look at images, each of them once (`moa.evaluation.features`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from moa.evaluation import samples
from moa.evaluation.boxes import crop
from moa.evaluation.features import Features, encode_persons
from moa.evaluation.identity import (
    ColorEmbedder,
    Detector,
    DetectorConfig,
    Embedder,
    EmbedderConfig,
    load_detector,
    load_embedder,
    person_boxes,
)
from moa.evaluation.persons import PersonFinder
from moa.evaluation.prompt import ClipJudge
from moa.methods import ModelSource

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ScoreConfig:
    """The judges of the evaluation. None of them shares weights with what it judges."""

    clip_judge: ModelSource  # PC
    segmenter: ModelSource  # where the persons are, for metrics that look beside them
    identity: EmbedderConfig = field(default_factory=EmbedderConfig)  # IP
    detector: DetectorConfig = field(default_factory=DetectorConfig)  # IP
    segmenter_label: str = "person"
    segmenter_threshold: float = 0.8  # least score of a segment
    batch_size: int = 32  # images through a judge at once
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} must be at least 1")


class Judges:
    """All models that look at images, loaded once."""

    def __init__(self, config: ScoreConfig):
        self.config = config
        wanted = DetectorConfig(
            "segmenter",
            config.segmenter.id,
            config.segmenter.revision,
            config.segmenter_label,
            config.segmenter_threshold,
        )
        self.persons = PersonFinder(wanted.segmenter(config.device), wanted.min_area)
        shared = config.detector == wanted  # then the persons' boxes are the detections, found once
        self.detector: Detector | None = None if shared else load_detector(config.detector, config.device)
        self.embedder: Embedder = load_embedder(config.identity, config.device)
        self.color = ColorEmbedder()
        self.clip = ClipJudge(config.clip_judge, config.device)

    def look(self, images: Sequence[Image.Image]) -> list[Features]:
        """The features of RGB images, in batches, on which they depend by rounding only."""
        size = self.config.batch_size
        return [f for start in range(0, len(images), size) for f in self._batch(images[start : start + size])]

    def _batch(self, images: Sequence[Image.Image]) -> list[Features]:
        persons = self.persons(images)
        if self.detector is None:
            found = [person_boxes(p, image) for p, image in zip(persons, images, strict=True)]
        else:
            found = self.detector.detect(images)
        crops = [crop(image, box) for image, d in zip(images, found, strict=True) for box in d.boxes]
        counts = np.cumsum([len(d.boxes) for d in found])[:-1]
        identity = np.split(_in_batches(self.embedder.embed, crops, self.config.batch_size), counts)
        color = np.split(self.color.embed(crops), counts)
        clip = self.clip.image_features(images)
        return [
            Features(image.size, found[n], identity[n], color[n], clip[n], encode_persons(persons[n].union))
            for n, image in enumerate(images)
        ]


def _in_batches(
    embed: Callable[[Sequence[Image.Image]], Floats], crops: Sequence[Image.Image], size: int
) -> Floats:
    parts = [embed(crops[start : start + size]) for start in range(0, max(len(crops), 1), size)]
    return np.concatenate(parts)


def look_at_files(judges: Judges, root: Path, paths: Sequence[str]) -> dict[str, Features]:
    """Features of image files below `root`, by path, with a progress bar."""
    size = judges.config.batch_size
    found: dict[str, Features] = {}
    with tqdm(total=len(paths), desc="look at images", unit="image") as bar:
        for start in range(0, len(paths), size):
            part = list(paths[start : start + size])
            opened = [samples.open_image(root / path) for path in part]
            seen = judges.look([image for image, _ in opened])
            for path, (_, digest), features in zip(part, opened, seen, strict=True):
                found[path] = Features(**{**vars(features), "sha256": digest})
            bar.update(len(part))
    return found
