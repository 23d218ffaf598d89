"""Who is generated: the photos of a split's subjects."""

from __future__ import annotations

from pathlib import Path

from moa.data.records import SUBJECT, decode_image, read_rows
from moa.methods import Subject


def read_subjects(path: str | Path) -> dict[str, Subject]:
    """The subjects of a parquet file, by id, in the order of their ids. Raises DataError as `read_rows`."""
    rows = sorted(read_rows(path, SUBJECT), key=lambda row: row["id"])
    return {row["id"]: Subject(row["id"], row["word"], decode_image(row["image"])) for row in rows}
