"""A shard of photos: bytes as they came, checked, with what was put aside in a table of its own.

Entry point, called by `python -m moa photos`:

    run(config, split, shard, shards, index, raw, quarantined)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pyarrow.compute as pc
from tqdm import tqdm

from moa.data.errors import DataError
from moa.data.records import RAW, REJECTED, Row, read_table, sha256, write_rows
from moa.data.sources import hub
from moa.data.sources.archive import read_annotation
from moa.data.sources.config import PhotosConfig
from moa.data.sources.listing import shard_of
from moa.data.sources.lock import INDEX
from moa.data.sources.quarantine import Quarantined, examine

LARGEST = 2**31 - 1  # bytes of a column of binary values


def photos_of(index: Path, split: str, shard: int, shards: int) -> list[Row]:
    """The index's rows of a shard, sorted by id."""
    table = read_table(index, INDEX)
    rows = table.filter(pc.equal(table["split"], split)).to_pylist()
    return [row for row in rows if shard_of(row["id"], shards) == shard]


def reader(config: PhotosConfig, rows: list[Row]) -> Callable[[Row], bytes]:
    """A function that reads the bytes of a photo of these rows."""
    if config.source == "dataset" and rows:
        loaded = hub.load(config, rows[0]["revision"] or "")
        return lambda row: hub.read(loaded, row["offset"], config)

    def read(row: Row) -> bytes:
        with Path(config.path, row["file"]).open("rb") as file:
            file.seek(row["offset"])
            return file.read(row["size"])

    return read


def raw_row(row: Row, read: Callable[[Row], bytes], config: PhotosConfig) -> Row:
    """The raw row of a photo. Raises Quarantined, or DataError if its bytes are not those of the index."""
    if row["reason"] and row["reason"] != "both_splits":
        raise Quarantined(row["reason"], row["detail"])
    if row["size"] > config.max_bytes:
        raise Quarantined("large_photo", f"{row['size']} bytes, max_bytes is {config.max_bytes}")
    data = read(row)
    if sha256(data) != row["sha256"]:
        raise DataError(
            f"{config.path}: {row['name']} has changed since it was locked; put the old file "
            "back, or, if the change is meant, run `python -m moa lock-photos --accept` (docs/data.md)"
        )
    width, height = examine(data, config)
    if config.source == "fastcomposer":
        try:
            read_annotation(Path(config.path), row["id"], (height, width))
        except DataError as error:
            raise Quarantined("annotation", str(error)) from error
    if row["reason"]:  # last: pages that say 404 are all alike, and no photos
        raise Quarantined(row["reason"], row["detail"])
    return {
        "id": row["id"],
        "image": {"bytes": data, "path": Path(row["name"]).name if row["file"] else None},
        "sha256": row["sha256"],
        "width": width,
        "height": height,
        "source": "@".join(filter(None, [config.name, row["revision"]])),
    }


def run(
    config: PhotosConfig,
    split: Literal["train", "validation"],
    shard: int,
    shards: int,
    index: Path,
    raw: Path,
    quarantined: Path,
) -> None:
    """Write one shard, numbered from 0, of the photos of an index.

    Args:
        shards: how many the split has; a photo's id alone decides which one it is in.
        raw: photos that every later stage can decode.
        quarantined: the others, each with its reason.

    Raises DataError for a shard that there is not, a photo that changed, or more bytes than a shard can hold.
    """
    if not 0 <= shard < shards:
        raise DataError(f"{split} has shards 0..{shards - 1}, not {shard}; correct shards.{split}")
    listed = photos_of(index, split, shard, shards)
    read, kept, aside, total = reader(config, listed), [], [], 0
    for row in tqdm(listed, desc=f"photos {split}-{shard:03d}", unit="photo"):
        try:
            kept.append(raw_row(row, read, config))
        except Quarantined as why:
            aside.append({"id": row["id"], "reason": why.reason, "detail": why.detail})
            continue
        total += row["size"]
        if total > LARGEST:
            raise DataError(f"{raw}: more than 2 GB of photos in a shard; raise shards.{split}, now {shards}")
    write_rows(quarantined, aside, REJECTED)
    write_rows(raw, kept, RAW)
