"""The annotations of FastComposer's published archive: caption, segments and id map of a photo."""

from __future__ import annotations

import json
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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{about} is no annotation of FastComposer's archive ({error!r})") from error
    try:
        ids = np.load(mask, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{mask} is no NumPy array ({error})") from error
    if ids.shape != size or not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() > 65535:
        raise DataError(f"{mask} is no id map 0..65535 of {size} pixels, but {ids.dtype} of {ids.shape}")
    return caption, segments, ids.astype(np.int32)


def _parsed(about: Any) -> tuple[str, list[Row]]:
    """Caption and segments of an annotation as `RECORD` has them. Raises ValueError, KeyError, TypeError."""
    caption = about["caption"]
    segments = []
    for given in about["segments"]:
        segment = {
            "segment_id": given["id"],
            "word": given["word"],
            "start": given["start"],
            "end": given["end"],
            "bbox": list(given["bbox"]),
            "label": given["coco_label"],
            "score": None,  # the archive does not say
        }
        numbers = [segment["segment_id"], segment["start"], segment["end"], *segment["bbox"]]
        if len(segment["bbox"]) != 4 or not all(type(number) is int for number in numbers):
            raise ValueError(f"ids, offsets and four corners are whole numbers: {given}")
        if not 0 <= segment["start"] < segment["end"] <= len(caption):
            raise ValueError(f"offsets lie outside the caption: {given}")
        segments.append(segment)
    return caption, segments
