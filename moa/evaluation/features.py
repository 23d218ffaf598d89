"""What the judges see in an image, computed once and shared by all metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from moa.data.records import decode_mask, encode_mask, read_rows, write_rows
from moa.evaluation import samples
from moa.evaluation.identity import (
    ColorEmbedder,
    Detection,
    Detector,
    DetectorConfig,
    Embedder,
    EmbedderConfig,
    areas,
    crop,
    load_detector,
    load_embedder,
    person_boxes,
)
from moa.evaluation.persons import PersonFinder
from moa.evaluation.prompt import ClipJudge
from moa.methods import ModelSource

Floats = NDArray[np.float64]

_VECTOR = pa.list_(pa.float64())
_COLUMNS: dict[str, pa.DataType] = {
    "path": pa.string(),  # below the results folder; of a reference, the subject's id
    "sha256": pa.string(),  # of the file
    "width": pa.int32(),
    "height": pa.int32(),
    "boxes": pa.list_(_VECTOR),  # [N, 4] faces or persons, the largest first
    "box_scores": _VECTOR,
    "identity": pa.list_(_VECTOR),  # [N, D] unit vectors of the faces
    "color": pa.list_(_VECTOR),  # [N, 48] the mean-colour baseline's
    "clip": _VECTOR,  # [D] unit vector of the whole image
    "persons": pa.binary(),  # PNG, 1 where a person is
}
FEATURES = pa.schema(
    [pa.field(name, kind, nullable=False) for name, kind in _COLUMNS.items()],
    metadata={"moa_schema": "features/1"},
)


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


@dataclass(frozen=True)
class Features:
    """The judges' view of one image."""

    size: tuple[int, int]  # width, height
    detection: Detection
    identity: Floats  # [N, D]
    color: Floats  # [N, 48]
    clip: Floats  # [D]
    persons: NDArray[np.bool_]  # [H, W]
    sha256: str = ""

    @property
    def face_sizes(self) -> Floats:
        """[N] areas of the boxes as fractions of the image's."""
        return areas(self.detection.boxes) / (self.size[0] * self.size[1])


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
            Features(image.size, found[n], identity[n], color[n], clip[n], persons[n].union)
            for n, image in enumerate(images)
        ]


def _in_batches(
    embed: Callable[[Sequence[Image.Image]], Floats], crops: Sequence[Image.Image], size: int
) -> Floats:
    parts = [embed(crops[start : start + size]) for start in range(0, max(len(crops), 1), size)]
    return np.concatenate(parts)


# --- Files ------------------------------------------------------------------------------------------------


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


def write(path: str | Path, features: Mapping[str, Features]) -> None:
    """Write features, in the order of their paths."""
    write_rows(path, _rows(features), FEATURES)


def _rows(features: Mapping[str, Features]) -> Iterator[dict[str, Any]]:
    for path, f in sorted(features.items()):
        yield {
            "path": path,
            "sha256": f.sha256,
            "width": f.size[0],
            "height": f.size[1],
            "boxes": f.detection.boxes.tolist(),
            "box_scores": f.detection.scores.tolist(),
            "identity": f.identity.tolist(),
            "color": f.color.tolist(),
            "clip": f.clip.tolist(),
            "persons": encode_mask(f.persons.astype(np.uint8)),
        }


def read(paths: str | Path | Sequence[str | Path]) -> dict[str, Features]:
    """Features by path. Raises DataError naming a missing, cut or foreign file."""
    return {row["path"]: _features(row) for row in read_rows(paths, FEATURES)}


def _vectors(rows: list[list[float]]) -> Floats:
    """[N, D]; D is 0 where there is nobody, as the file does not know it."""
    return np.array(rows, dtype=float) if rows else np.zeros((0, 0))


def _features(row: Mapping[str, Any]) -> Features:
    boxes = np.array(row["boxes"], dtype=float).reshape(-1, 4)
    return Features(
        size=(row["width"], row["height"]),
        detection=Detection(boxes, np.array(row["box_scores"], dtype=float)),
        identity=_vectors(row["identity"]),
        color=_vectors(row["color"]),
        clip=np.array(row["clip"], dtype=float),
        persons=decode_mask(row["persons"]) > 0,
        sha256=row["sha256"],
    )
