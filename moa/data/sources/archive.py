"""The annotations of FastComposer's published archive: caption, segments and id map of a photo."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from moa.data.errors import DataError
from moa.data.records import IdMap, Row
from moa.data.sources.listing import archive_file


def read_annotation(root: Path, photo: str, size: tuple[int, int]) -> tuple[str, list[Row], IdMap]:
    """Caption, segments and id map [H, W] of a photo of `size` (H, W), as the archive has them.

    Raises DataError, naming the file, if they are missing, damaged, or do not fit each other or the photo.
    """
    about, mask = (root / archive_file(photo, suffix) for suffix in (".json", ".npy"))
    try:
        caption, segments = _parsed(json.loads(about.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{about} is no annotation of FastComposer's archive ({error!r})") from error
    try:
        ids = np.lib.format.open_memmap(mask, mode="r")  # reads the header alone, whatever size it claims
    except Exception as error:  # from damaged headers NumPy raises anything
        raise DataError(f"{mask} is no NumPy array ({type(error).__name__}: {error})") from error
    if ids.shape != size or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > 65535:
        raise DataError(f"{mask} is no id map 0..65535 of {size} pixels, but {ids.dtype} of {ids.shape}")
    return caption, segments, np.array(ids, np.int32)


def _text(given: Any) -> str:
    """A text that a table can hold. Raises ValueError."""
    if not isinstance(given, str):
        raise ValueError(f"caption, word and coco_label are texts, not {given!r}")
    given.encode("utf-8")  # half a pair of surrogates is no UTF-8
    return given


def _box(given: Any) -> list[int]:
    """The corners x1, y1, x2, y2 as whole pixels that hold the box. Raises ValueError, TypeError."""
    corners = list(given)
    numbers = all(type(corner) in (int, float) and math.isfinite(corner) for corner in corners)
    if len(corners) != 4 or not numbers:
        raise ValueError(f"a bbox is four numbers, not {given!r}")
    return [*map(math.floor, corners[:2]), *map(math.ceil, corners[2:])]


def _parsed(about: Any) -> tuple[str, list[Row]]:
    """Caption and segments of an annotation as `RECORD` has them. Raises ValueError, KeyError, TypeError."""
    caption = _text(about["caption"])
    segments = []
    for given in about["segments"]:
        segment = {
            "segment_id": given["id"],
            "word": _text(given["word"]),
            "start": given["start"],
            "end": given["end"],
            "bbox": _box(given["bbox"]),
            "label": _text(given["coco_label"]),
            "score": None,  # the archive does not say
        }
        numbers = [segment["segment_id"], segment["start"], segment["end"], *segment["bbox"]]
        if not all(type(number) is int and abs(number) < 2**31 for number in numbers):
            raise ValueError(f"ids and offsets are whole numbers, and corners numbers, of 32 bits: {given}")
        if not 0 <= segment["start"] < segment["end"] <= len(caption):
            raise ValueError(f"offsets lie outside the caption: {given}")
        segments.append(segment)
    return caption, segments
