"""What is put aside, and why: the check that every photo passes before it comes into a raw shard.

Entry point, called by `python -m moa quarantine`:

    run(config, index, quarantined, output)     what all shards put aside → one table, or an error
"""

from __future__ import annotations

import csv
import io
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from moa.data.errors import BrokenImage, DataError, UnknownWhite
from moa.data.records import REJECTED, Row, decode_image, read_rows, read_table
from moa.data.sources.config import PhotosConfig, QuarantineConfig
from moa.data.sources.lock import INDEX
from moa.data.sources.reasons import QUARANTINED
from moa.files import write_atomically

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")  # by content; none runs a program


class Quarantined(Exception):
    """Why a photo is put aside: one of `QUARANTINED`, and the particulars."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def _opened(data: bytes) -> Image.Image:
    """The header of a photo. Raises Quarantined."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its size is checked here
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Quarantined("large_photo", str(error)) from error
    except UnidentifiedImageError as error:
        read = f"{', '.join(FORMATS)} as Pillow reads them"
        raise Quarantined("no_image", f"none of {read}; the file begins with {data[:16]!r}") from error
    except Exception as error:  # a damaged header makes Pillow raise anything
        raise Quarantined("broken", f"{type(error).__name__}: {error}") from error


def examine(data: bytes, config: PhotosConfig) -> tuple[int, int]:
    """Width and height in pixels, upright, of a photo that every later stage can decode.

    The header decides on size and kind before a pixel is decoded, so a bomb costs no memory. Raises
    Quarantined.
    """
    picture = _opened(data)
    width, height = picture.size
    if width * height > config.max_pixels:
        raise Quarantined("large_photo", f"{width} × {height} pixels, max_pixels is {config.max_pixels}")
    if min(width, height) < config.min_side:
        raise Quarantined("small_photo", f"{width} × {height} pixels, min_side is {config.min_side}")
    if picture.mode == "I":
        raise Quarantined("grey", "signed or 32-bit whole numbers; save it with 8 or 16 unsigned bits")
    try:
        several = picture.format != "MPO" and getattr(picture, "is_animated", False)  # previews
        size = decode_image({"bytes": data}).size
    except UnknownWhite as error:
        raise Quarantined("grey", str(error)) from error
    except BrokenImage as error:
        raise Quarantined("broken", str(error)) from error
    except Exception as error:  # from damaged bytes Pillow raises anything, and would do so in later stages
        raise Quarantined("broken", f"{type(error).__name__}: {error}") from error
    if several:
        raise Quarantined("animated", f"more than one picture in one {picture.format}")
    return size


# --- The limit --------------------------------------------------------------------------------------------


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many photos were put aside for each reason, in the order of `QUARANTINED`."""
    found = Counter(row["reason"] for row in rows)
    return {reason: found[reason] for reason in QUARANTINED if found[reason]}


def check(rows: Sequence[Row], photos: int, config: QuarantineConfig) -> None:
    """Raise DataError, with the counts and examples, if more photos were put aside than the limit allows."""
    limit = config.max_quarantined
    most = limit * photos if isinstance(limit, float) else limit
    if len(rows) > most:
        examples = "; ".join(f"{row['id']} ({row['reason']}: {row['detail']})" for row in rows[:3])
        raise DataError(
            f"{len(rows)} of {photos} photos were put aside {counts(rows)}, more than "
            f"data.quarantine.max_quarantined {limit}: {examples}; mend the source, or raise the limit"
        )


def check_splits(rows: Sequence[Row], index: Sequence[Row]) -> None:
    """Raise DataError unless the shards put aside those photos that the index says are in both splits.

    A photo becomes one, or ceases to be, by a change of the held-out photo, and its own shard is then not
    made again. Files may share an id, so those that the index puts aside are counted.
    """
    both = {row["id"]: row["name"] for row in index if row["reason"] == "both_splits"}
    expected = Counter(row["id"] for row in index if row["reason"])
    aside = Counter(row["id"] for row in rows)
    new = {photo for photo in both if aside[photo] < expected[photo]}
    old = {row["id"] for row in rows if row["reason"] == "both_splits"}
    names = {row["id"]: row["name"] for row in index} | both
    wrong = sorted(names.get(photo, photo) for photo in new | (old - both.keys()))
    if wrong:
        raise DataError(
            f"{len(wrong)} photos ({', '.join(wrong[:3])}) have become, or no longer are, copies of held-out "
            "ones since their shards were made; `touch` these files and run the same command again"
        )


def _text(rows: Sequence[Mapping[str, str]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, REJECTED.names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def run(config: QuarantineConfig, index: Path, quarantined: Sequence[Path], output: Path) -> None:
    """List the photos of all shards that were put aside: CSV with id, reason, detail.

    Raises DataError beyond `max_quarantined`, and for shards older than a held-out copy of their photos; the
    shards' own tables are there to be looked at.
    """
    rows = sorted(read_rows(list(quarantined), REJECTED), key=lambda row: (row["reason"], row["id"]))
    photos = read_table(index, INDEX).select(["id", "name", "reason"]).to_pylist()
    check_splits(rows, photos)
    check(rows, len(photos), config)
    write_atomically(output, lambda path: path.write_text(_text(rows), "utf-8"))
