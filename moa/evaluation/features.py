"""What the judges saw in an image, shared by all metrics, and the file that keeps it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moa.data.records import decode_mask, each_row, encode_mask, write_rows
from moa.evaluation.boxes import Detection, areas

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
class Features:
    """The judges' view of one image."""

    size: tuple[int, int]  # width, height
    detection: Detection
    identity: Floats  # [N, D]
    color: Floats  # [N, 48]
    clip: Floats  # [D]
    mask: bytes  # PNG, 1 where a person is: of tens of thousands of images, masks would take gigabytes
    sha256: str = ""

    @property
    def persons(self) -> NDArray[np.bool_]:
        """[H, W], true where a person is; decoded anew each time."""
        return decode_mask(self.mask) > 0

    @property
    def face_sizes(self) -> Floats:
        """[N] areas of the boxes as fractions of the image's."""
        return areas(self.detection.boxes) / (self.size[0] * self.size[1])


def encode_persons(persons: NDArray[np.bool_]) -> bytes:
    """A mask [H, W] as `Features` keep it."""
    return encode_mask(persons.astype(np.uint8))


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
            "persons": f.mask,
        }


def read(paths: str | Path | Sequence[str | Path]) -> dict[str, Features]:
    """Features by path. Raises DataError naming a missing, cut or foreign file."""
    files = [paths] if isinstance(paths, str | Path) else paths
    return {row["path"]: _features(row) for row in each_row(files, FEATURES)}


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
        mask=row["persons"],
        sha256=row["sha256"],
    )
