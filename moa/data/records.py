"""Schemas of every table that the data stages exchange, and the only code that reads and writes them.

`docs/schemas.md` explains the columns. Files are written whole or not at all; every page carries a checksum,
so a cut or damaged file is an error that names it, never a shorter data set.
"""

from __future__ import annotations

import hashlib
import io
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from moa.data.errors import BrokenImage, DataError, UnknownWhite
from moa.files import write_atomically
from moa.photos import convert

Row = dict[str, Any]
IdMap = NDArray[np.int32]

PHOTOS_A_GROUP = 8  # rows of a row group of a table with photos: as few are read at a time

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as the Image feature of `datasets`
_BOX = pa.list_(pa.int32(), 4)  # x1, y1, x2, y2 in pixels; x2 and y2 exclusive
_FOUND = pa.struct(
    [
        ("segment_id", pa.int32()),
        ("label", pa.string()),
        ("score", pa.float32()),
        ("bbox", _BOX),
        ("area", pa.int32()),
    ]
)
_SUBJECT = pa.struct(
    [
        ("segment_id", pa.int32()),
        ("word", pa.string()),
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("bbox", _BOX),
        ("label", pa.string()),
        ("score", pa.float32()),
    ]
)


def _hf_feature(kind: pa.DataType) -> Any:
    """The `datasets` feature, as JSON, of an arrow type."""
    if kind == _IMAGE:
        return {"_type": "Image"}
    if pa.types.is_struct(kind):
        return {field.name: _hf_feature(field.type) for field in kind}
    if pa.types.is_fixed_size_list(kind):
        return {"feature": _hf_feature(kind.value_type), "length": kind.list_size, "_type": "List"}
    if pa.types.is_list(kind):
        return {"feature": _hf_feature(kind.value_type), "_type": "List"}
    return {"dtype": {"float": "float32"}.get(str(kind), str(kind)), "_type": "Value"}


def _schema(name: str, columns: Mapping[str, pa.DataType], optional: Sequence[str] = ()) -> pa.Schema:
    """A schema that carries its name and version, and what `datasets` needs to decode its images.

    Which columns may be empty is kept in the metadata, because `datasets` wants every field to be nullable.
    """
    features = {column: _hf_feature(kind) for column, kind in columns.items()}
    return pa.schema(
        list(columns.items()),
        metadata={
            "moa_schema": f"{name}/1",
            "moa_optional": json.dumps(list(optional)),
            "huggingface": json.dumps({"info": {"features": features}}),
        },
    )


_TEXT = pa.string()
RAW = _schema(
    "raw",
    {
        "id": _TEXT,
        "image": _IMAGE,
        "sha256": _TEXT,
        "width": pa.int32(),
        "height": pa.int32(),
        "source": _TEXT,
    },
)
CAPTION = _schema(
    "caption",
    {"id": _TEXT, "caption": _TEXT, "problem": _TEXT, "model": _TEXT, "revision": _TEXT, "settings": _TEXT},
    optional=("caption", "problem"),
)
SEGMENT = _schema(
    "segment",
    {
        "id": _TEXT,
        "mask": pa.binary(),
        "segments": pa.list_(_FOUND),
        "problem": _TEXT,
        "model": _TEXT,
        "revision": _TEXT,
        "settings": _TEXT,
    },
    optional=("mask", "problem"),
)
RECORD = _schema(
    "record",
    {
        "id": _TEXT,
        "image": _IMAGE,
        "width": pa.int32(),
        "height": pa.int32(),
        "caption": _TEXT,
        "segments": pa.list_(_SUBJECT),
        "mask": pa.binary(),
        "split": _TEXT,
        "source": _TEXT,
        "sha256": _TEXT,
        "caption_model": _TEXT,
        "caption_revision": _TEXT,
        "segment_model": _TEXT,
        "segment_revision": _TEXT,
    },
)
REJECTED = _schema("rejected", {"id": _TEXT, "reason": _TEXT, "detail": _TEXT})
SUBJECT = _schema(
    "subject", {"id": _TEXT, "identity": _TEXT, "word": _TEXT, "image": _IMAGE, "sha256": _TEXT}
)
TRUTH = _schema(
    "truth", {"id": _TEXT, "scene": _TEXT, "caption": _TEXT, "mask": pa.binary(), "labels": _TEXT}
)


def optional_columns(schema: pa.Schema) -> set[str]:
    """The columns that may be empty: as the metadata says or, without it, the nullable ones."""
    listed = (schema.metadata or {}).get(b"moa_optional")
    if listed is None:
        return {field.name for field in schema if field.nullable}
    return set(json.loads(listed))


# --- Files ------------------------------------------------------------------------------------------------


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write rows as parquet, whole or not at all.

    Raises DataError, naming file and column, if a row lacks a column, has one too many, holds a value of the
    wrong type, or None where the schema does not allow it.
    """
    listed = [dict(row) for row in rows]
    for row in listed:
        if set(row) != set(schema.names):
            wrong = ", ".join(sorted(set(row) ^ set(schema.names)))
            raise DataError(f"{path}: row {row.get('id')!r} must have the schema's columns; check {wrong}")
    optional = optional_columns(schema)
    columns = [
        _column(path, [row[field.name] for row in listed], field, field.name in optional) for field in schema
    ]
    table = pa.Table.from_arrays(columns, schema=schema)
    options = {"row_group_size": PHOTOS_A_GROUP} if "image" in schema.names else {}
    write_atomically(
        path, lambda temporary: pq.write_table(table, temporary, write_page_checksum=True, **options)
    )


def _column(path: str | Path, values: list[Any], field: pa.Field, optional: bool) -> pa.Array:
    try:
        column = pa.array(values, field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise DataError(f"{path}: column {field.name!r} must be {field.type}: {error}") from error
    if column.null_count and not optional:
        raise DataError(f"{path}: column {field.name!r} must not be empty in any row")
    return column


@contextmanager
def _opened(path: str | Path, schema: pa.Schema) -> Iterator[pq.ParquetFile]:
    """A parquet file of `schema`; DataError, as `read_table` says, if it is none or cannot be read."""
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist; run the workflow to make it, or correct the path")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_schema(path, file.schema_arrow, schema)
            yield file
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is cut short or damaged ({error}); delete it and run the same command again"
        ) from error


def read_table(path: str | Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a parquet file, or some columns of it, and check it against `schema`.

    Raises DataError, naming the file and the cure, if it is missing, cut short or damaged, and, naming the
    column, if it is a table of another kind.
    """
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    with _opened(path, schema) as file:
        table = file.read(columns=wanted.names)
    return table.select(wanted.names).cast(wanted)


def _check_schema(path: str | Path, found: pa.Schema, wanted: pa.Schema) -> None:
    kind = (wanted.metadata or {}).get(b"moa_schema", b"").decode()
    missing = [name for name in wanted.names if name not in found.names]
    surplus = [name for name in found.names if name not in wanted.names]
    if missing or surplus:
        raise DataError(f"{path} is no {kind} table: missing columns {missing}, unknown columns {surplus}")
    for field in wanted:
        if found.field(field.name).type != field.type:
            actual = found.field(field.name).type
            raise DataError(f"{path} is no {kind} table: column {field.name!r} is {actual}, not {field.type}")
    if found.names != wanted.names:
        raise DataError(f"{path} is no {kind} table: its columns must be in the order {wanted.names}")


def each_row(
    paths: Iterable[str | Path], schema: pa.Schema, columns: Sequence[str] | None = None
) -> Iterator[Row]:
    """The rows of several files, of which a row group at a time is in memory; errors as in `read_table`."""
    for path in paths:
        with _opened(path, schema) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group, columns).to_pylist()


def read_rows(
    paths: str | Path | Sequence[str | Path], schema: pa.Schema, columns: Sequence[str] | None = None
) -> list[Row]:
    """All rows of one file, or of several in the given order; errors as in `read_table`."""
    return list(each_row([paths] if isinstance(paths, (str, Path)) else paths, schema, columns))


def count_rows(path: str | Path, schema: pa.Schema) -> int:
    """How many rows a file has; none is read. Errors as in `read_table`."""
    with _opened(path, schema) as file:
        return int(file.metadata.num_rows)


def read_at(path: str | Path, schema: pa.Schema, places: Iterable[int]) -> list[Row]:
    """The rows at these places, counted from 0, of which only the row groups are read.

    Errors as in `read_table`, and IndexError for a place that is not there.
    """
    with _opened(path, schema) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = [0, *accumulate(sizes)]
        return [_row_at(file, starts, place) for place in places]


def _row_at(file: pq.ParquetFile, starts: Sequence[int], place: int) -> Row:
    if not 0 <= place < starts[-1]:
        raise IndexError(f"there is no row {place} of {starts[-1]}")
    group = bisect_right(starts, place) - 1
    row: Row = file.read_row_group(group).slice(place - starts[group], 1).to_pylist()[0]
    return row


# --- Images and masks -------------------------------------------------------------------------------------


def sha256(data: bytes) -> str:
    """SHA-256 of bytes in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def encode_image(image: Image.Image | NDArray[np.uint8], path: str | None = None) -> dict[str, Any]:
    """An image column's value: lossless PNG bytes of an RGB image, given as PIL or as [H, W, 3] uint8."""
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.convert("RGB").save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": path}


def decode_image(value: Mapping[str, Any]) -> Image.Image:
    """The RGB picture of an image column's value, upright, made 8-bit RGB by `moa.photos.convert`.

    Raises BrokenImage if there are no bytes, or bytes that cannot be decoded to the last row; of these
    UnknownWhite for grey values out of range.
    """
    data = value["bytes"]
    if not data:
        raise BrokenImage("no image bytes")
    try:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenImage(f"image cannot be decoded: {error}") from error
    try:
        return convert(picture)
    except ValueError as error:
        raise UnknownWhite(f"image cannot be shown: {error}") from error


def encode_mask(ids: NDArray[Any]) -> bytes:
    """PNG bytes of an id map [H, W], whole numbers 0..65535; 8 bits deep where that is enough.

    Raises DataError for another shape or range.
    """
    if ids.ndim != 2 or ids.min(initial=0) < 0 or ids.max(initial=0) > 65535:
        raise DataError(f"an id map is [H, W] with ids 0..65535, not {ids.shape} up to {ids.max(initial=0)}")
    buffer = io.BytesIO()
    depth = np.uint8 if ids.max(initial=0) < 256 else np.uint16
    Image.fromarray(ids.astype(depth)).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_mask(data: bytes) -> IdMap:
    """The id map [H, W], int32, of PNG bytes; 0 is background. Raises DataError if it is no such PNG."""
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"mask cannot be decoded: {error}; make its shard again") from error
    if picture.mode not in ("L", "I", "I;16"):
        raise DataError(f"a mask is a single-channel PNG, not mode {picture.mode}; make its shard again")
    return np.asarray(picture).astype(np.int32)


def bounding_box(inside: NDArray[np.bool_]) -> list[int]:
    """[x1, y1, x2, y2] of the true pixels of [H, W], x2 and y2 exclusive; DataError if there is none."""
    if not inside.any():
        raise DataError("an empty mask has no bounding box")
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
