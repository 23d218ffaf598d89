"""Schemas of the evaluation: what is to be made, what was made, how it scored. One row an image.

`REQUEST` + how it was made = `MADE`; + scores = `SAMPLE`. Every table and figure reads `SAMPLE` rows only.
`docs/schemas.md` explains the columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from moa.data.errors import DataError
from moa.data.records import read_rows, sha256, write_rows
from moa.methods import Request, Subject

Row = dict[str, Any]

_TEXT, _TEXTS = pa.string(), pa.list_(pa.string())
_REQUEST: dict[str, pa.DataType] = {
    "split": _TEXT,  # of the protocol: "test" or "validation"
    "kind": _TEXT,  # of the protocol: "single", "multi", "swap", ...
    "subject": _TEXT,  # "test-0007"; of a pair "test-0007+test-0081"
    "subjects": _TEXTS,
    "words": _TEXTS,  # what the prompt calls each subject
    "prompt_id": _TEXT,
    "prompt_group": _TEXT,
    "prompt": _TEXT,
    "spans": pa.list_(pa.list_(pa.int32(), 2)),  # characters of each subject's word, end exclusive
    "index": pa.int32(),  # 0, 1, ... of the images for the same subject and prompt
    "seed": pa.int64(),  # of the starting noise
    "path": _TEXT,  # of the image: in a request below images/<method>/, later below the results folder
}
_MADE: dict[str, pa.DataType] = {
    "method": _TEXT,
    **_REQUEST,
    "seconds": pa.float64(),  # wall time of the batch that made it, divided by the batch's size
    "train_seed": pa.int32(),  # of the method's training; null where nothing was trained
}
_SAMPLE: dict[str, pa.DataType] = {
    **_MADE,
    "members": _TEXTS,  # all on whose looks the scores depend: the subjects, and who was shown in their place
    "ip": pa.float64(),  # identity preservation, 0..1
    "ip_color": pa.float64(),  # the same by mean colours instead of a network: what any judge must beat
    "pc": pa.float64(),  # prompt consistency, a cosine
    "found": pa.bool_(),  # as many faces (or persons) as the request has subjects
    "faces": pa.int32(),  # how many were found, wanted or not
    "face_size": pa.float64(),  # smallest matched box, fraction of the image's area; 0 if one is missing
}

_KEPT: dict[str, pa.DataType] = {
    "method": pa.string(),
    "train_seed": pa.int32(),
    "split": pa.string(),
    "kind": pa.string(),
    "prompt_id": pa.string(),
    "prompt_group": pa.string(),
    "index": pa.int32(),
    "subject": pa.string(),  # of the one image
    "other": pa.string(),  # of the other
    "members": pa.list_(pa.string()),  # everyone in either image
    "psnr": pa.float64(),  # dB; null where somebody was not found, or too little is left to compare
    "ssim": pa.float64(),
    "lpips": pa.float64(),  # null also where the configuration names no weights of it
    "outside": pa.float64(),  # fraction of the pixels outside everyone who was found
}  # of two images that differ in their subjects only


def _schema(
    name: str, columns: Mapping[str, pa.DataType], optional: Sequence[str] = (), version: int = 1
) -> pa.Schema:
    fields = [pa.field(column, kind, nullable=column in optional) for column, kind in columns.items()]
    return pa.schema(fields, metadata={"moa_schema": f"{name}/{version}"})


REQUEST = _schema("request", _REQUEST)
MADE = _schema("made", _MADE, optional=("train_seed",))
SAMPLE = _schema("sample", _SAMPLE, optional=("train_seed",), version=2)
KEPT = _schema("kept", _KEPT, optional=("train_seed", "psnr", "ssim", "lpips"), version=3)


def sort_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The order of rows in every file, so that shards finished in any order give the same bytes."""
    seed = -1 if row.get("train_seed") is None else row["train_seed"]
    return (
        row.get("method", ""),
        row["split"],
        row["kind"],
        row["subject"],
        row["prompt_id"],
        row["index"],
        seed,
    )


def write(path: str | Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema = SAMPLE) -> None:
    """Write rows in `sort_key`'s order, whole or not at all.

    Raises DataError, naming the file, for rows that do not fit the schema or appear twice.
    """
    ordered = sorted(rows, key=sort_key)
    for one, other in pairwise(ordered):
        if sort_key(one) == sort_key(other):
            raise DataError(f"{path}: two rows for {sort_key(one)}; give each part of the images once")
    write_rows(path, ordered, schema)


def read(paths: str | Path | Sequence[str | Path], schema: pa.Schema = SAMPLE) -> list[Row]:
    """All rows of one file or several. DataError names a missing, cut or foreign file, and the cure."""
    return read_rows(paths, schema)


def merge(parts: Sequence[str | Path], output: str | Path) -> None:
    """Join scored parts into one samples file; a row given twice is a DataError."""
    write(output, read(parts))


def to_request(row: Mapping[str, Any], subjects: Mapping[str, Subject]) -> Request:
    """What a method needs to make the image of a row; KeyError-free: an unknown subject is a DataError."""
    missing = [name for name in row["subjects"] if name not in subjects]
    if missing:
        raise DataError(f"no photo of subject {', '.join(missing)}; is the subjects file of another split?")
    return Request(
        prompt=row["prompt"],
        spans=tuple((start, end) for start, end in row["spans"]),
        subjects=tuple(subjects[name] for name in row["subjects"]),
        seed=row["seed"],
    )


def made(
    row: Mapping[str, Any], method: str, seconds: float, train_seed: int | None, folder: str = ""
) -> Row:
    """The `MADE` row of a request that `method` has carried out; its image lies at the row's `path`.

    `folder` is the one below images/ if it is not called like the method.
    """
    path = f"images/{folder or method}/{row['path']}"
    return {**row, "method": method, "path": path, "seconds": seconds, "train_seed": train_seed}


def open_image(path: Path) -> tuple[Image.Image, str]:
    """An RGB image and its file's SHA-256. Raises DataError naming a missing, empty or broken file."""
    try:
        data = path.read_bytes()
        with Image.open(path) as image:
            return image.convert("RGB"), sha256(data)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; delete its table and run the same command again") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(
            f"{path} is no readable image ({error}); delete it and run the same command again"
        ) from error
