"""Locks: SHA-256 of files by name, one a line, as `sha256sum --check` reads them; lines with # say more.

The first run notes what it saw. From then on another file of that name is an error. No run deletes a lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from moa.data.errors import DataError
from moa.files import write_atomically
from moa.hashing import file_hash


def read_lines(path: Path) -> list[str]:
    """The lines of a text; none if the file is not there. Raises DataError if it is no UTF-8."""
    try:
        return path.read_text("utf-8").split("\n") if path.is_file() else []
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error}); take it from where it came again") from error


def read(path: Path) -> tuple[list[str], dict[str, str]]:
    """Comments, whole lines, and hashes by name of a lock; empty without one.

    Raises DataError naming a wrong line.
    """
    comments: list[str] = []
    hashes: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if line.startswith("#"):
            comments.append(line)
        elif line:
            digest, _, name = line.partition("  ")
            if len(digest) != 64 or not name:
                raise DataError(f"{path}, line {number} is no hash and name; take the lock from your backup")
            hashes[name] = digest
    return comments, hashes


def write(path: Path, comments: Iterable[str], hashes: Mapping[str, str]) -> None:
    """Write a lock, whole or not at all: comments, which begin with #, and below them the hashes by name."""
    lines = [f"{digest}  {name}" for name, digest in sorted(hashes.items())]
    write_atomically(path, lambda part: part.write_text("\n".join([*comments, *lines, ""]), "utf-8"))


def verify(path: Path, file: str, key: str) -> None:
    """Hold one file against a lock that knows it by this name; `key` is the setting that names the file.

    Raises:
        FileNotFoundError: there is no such file. DataError: the lock has another hash, or none.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} is missing; put it there, or correct {key}")
    locked, actual = read(path)[1].get(file), file_hash(Path(file))
    if locked is None:
        raise DataError(
            f"{path} has no line for {file}, which {key} names; if you trust that file, "
            "`python -m moa lock-models --config …` adds it"
        )
    if actual != locked:
        raise DataError(
            f"{file} has SHA-256 {actual}, but {path} says {locked}: put the old file back, or, "
            f"if the change is meant, remove its line from {path}"
        )
