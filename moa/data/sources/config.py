"""Settings of a source of photos. Read by Snakemake itself, so nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

KINDS = ("folder", "tar", "dataset", "fastcomposer")
LARGEST = 89_478_485  # pixels; Pillow warns of a decompression bomb above


@dataclass(frozen=True)
class PhotosConfig:
    """Which photos, what they are called, who is held out, and what is put aside."""

    key: ClassVar[str] = "data.photos"  # where messages say that these settings stand
    stage: ClassVar[str] = "lock-photos"  # the stage that keeps the lock

    source: Literal["folder", "tar", "dataset", "fastcomposer"]  # the configuration's key `source`
    path: str  # folder of the photos, tars or archive; of `dataset` a folder or a name on the hub
    name: str  # what the column `source` of every photo says, "ffhq"
    lock: Path  # text file with the SHA-256 of every file at the first fetch; keep it beside the photos
    ids: Literal["path", "name"] = "path"  # a photo's id: its path below `path`, or its file's name alone
    held_out: float = 1 / 70  # share held out for validation [FastComposer: 1,000 of 70,000]
    min_side: int = 16  # pixels; smaller photos are put aside
    max_pixels: int = 50_000_000  # larger photos are put aside before they are decoded
    max_bytes: int = 100_000_000  # larger files are hashed, but put aside before they are decoded
    revision: str | None = None  # of a data set on the hub; a commit pins it
    dataset_split: str = "train"  # which split of the data set is read, "all" for all; ours is drawn anew
    image_column: str = "image"
    id_column: str | None = None  # of a data set; without one, an id is the start of the bytes' SHA-256

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be a share from 0 to below 1, not {self.held_out}")
        if not 1 <= self.max_pixels <= LARGEST:
            raise ValueError(f"max_pixels must be between 1 and {LARGEST}, not {self.max_pixels}")
        for key in ("min_side", "max_bytes"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, not {getattr(self, key)}")


@dataclass(frozen=True)
class QuarantineConfig:
    """How rotten a source may be. Apart from `PhotosConfig`, so that another limit makes no shard again."""

    max_quarantined: int | float = 0.01  # photos put aside at most: a share 0.0..1.0, or a whole number

    def __post_init__(self) -> None:
        limit = self.max_quarantined
        if limit < 0 or (isinstance(limit, float) and limit > 1):
            raise ValueError(
                f"max_quarantined must be a share from 0.0 to 1.0 or a whole number, not {limit}"
            )
