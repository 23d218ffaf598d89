"""The lock: SHA-256 of every file that the first fetch saw. A later mismatch is an error that names the file.

Entry point, called by `python -m moa lock-photos`:

    run(config, output, accept)      source → the lock (where there is none), and the index of photos

The lock is a text file that `sha256sum --check` reads as well, to be kept beside the photos or in version
control; the workflow never deletes it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from moa import lockfile
from moa.data.errors import DataError
from moa.data.records import Row, sha256, write_rows
from moa.data.sources import hub
from moa.data.sources.config import PhotosConfig
from moa.data.sources.listing import (
    COMPANIONS,
    Found,
    archive_file,
    escaped,
    photos,
    printable,
    split_of,
    unique,
)

TITLE = "SHA-256 of every file at the first fetch; see docs/data.md"
INDEX = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("revision", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ],
    metadata={"moa_schema": "index/1"},
)
THREADS = 8  # that read and hash files: more than cores, for disks answer slowly


# --- Hashing ----------------------------------------------------------------------------------------------


def hash_range(path: Path, offset: int, size: int) -> str:
    """SHA-256 of `size` bytes of a file from `offset` on. Raises OSError, also if there are fewer."""
    digest, left = hashlib.sha256(), size
    with path.open("rb") as file:
        file.seek(offset)
        while left:
            data = file.read(min(left, 1 << 20))
            if not data:
                raise OSError(f"{path} ends {left} bytes early")
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def _hash_files(config: PhotosConfig, found: Found) -> tuple[Found, dict[str, str]]:
    """A photo with the hashes of its files by name; with a reason if they cannot be read."""
    if found.reason in ("link", "unreadable", "name", "missing", "format"):
        return found, {}
    root = Path(config.path)
    try:
        hashes = {found.name: hash_range(root / found.file, found.offset, found.size)}
        if config.source == "fastcomposer":
            for name in (archive_file(found.id, suffix) for suffix in COMPANIONS):
                hashes[name] = hash_range(root / name, 0, (root / name).stat().st_size)
    except OSError as error:
        return replace(found, reason="unreadable", detail=f"{found.name}: {error}"), {}
    return found, hashes


def _files(config: PhotosConfig) -> Iterator[tuple[Found, dict[str, str]]]:
    listed = photos(config)
    with ThreadPoolExecutor(THREADS) as pool:
        hashed = pool.map(lambda found: _hash_files(config, found), listed)
        yield from tqdm(hashed, total=len(listed), desc=f"hash {config.name}", unit="photo")


def _rows(config: PhotosConfig, revision: str) -> Iterator[tuple[Found, dict[str, str]]]:
    """The rows of a data set; one without an id column is called after its bytes."""
    loaded = hub.load(config, revision)
    ids = loaded[config.id_column] if config.id_column else None
    for number in tqdm(range(len(loaded)), desc=f"hash {config.name}", unit="photo"):
        try:
            data = hub.read(loaded, number, config)
        except hub.LeadsOut as why:
            yield Found(f"row {number}", f"row {number}", "", number, 0, reason="link", detail=str(why)), {}
            continue
        digest = sha256(data)
        photo = str(ids[number]) if ids is not None else digest[:16]
        name = f"row {number}: {photo}"
        if printable(photo):
            yield Found(photo, name, "", number, len(data)), {name: digest}
        else:
            yield (
                Found(escaped(photo), f"row {number}", "", number, 0, reason="name", detail=escaped(photo)),
                {},
            )


def split(found: Found, config: PhotosConfig) -> str:
    """The split of a photo: the source's, else that of its id."""
    return found.split or split_of(found.id, config.held_out)


def without_held_out(
    found: Iterable[Found], hashes: Mapping[str, str], config: PhotosConfig
) -> Iterator[Found]:
    """The photos, with a reason for those of training whose bytes are those of a held-out one, too."""
    listed = list(found)
    splits = {photo.name: split(photo, config) for photo in listed if not photo.reason}
    held_out = {hashes[name]: name for name, where in splits.items() if where == "validation"}
    for photo in listed:
        other = held_out.get(hashes.get(photo.name, "")) if splits.get(photo.name) == "train" else None
        detail = f"{photo.name} has the bytes of {other}, which is held out"
        yield replace(photo, reason="both_splits", detail=detail) if other and not photo.reason else photo


def hashed(config: PhotosConfig, revision: str) -> tuple[list[Found], dict[str, str]]:
    """All photos of a source, and the SHA-256 of their files by name. Raises DataError."""
    pairs = list(_rows(config, revision) if config.source == "dataset" else _files(config))
    hashes = {name: digest for _, part in pairs for name, digest in part.items()}
    return list(without_held_out(unique(found for found, _ in pairs), hashes, config)), hashes


# --- The lock ---------------------------------------------------------------------------------------------


def read_lock(path: Path) -> tuple[str, str, dict[str, str]]:
    """Commit, what was asked for, and hashes by name of a lock; empty without one.

    Raises DataError naming a wrong line.
    """
    comments, hashes = lockfile.read(path)
    about = dict(comment.partition(": ")[::2] for comment in comments)
    return about.get("# revision", ""), about.get("# asked", ""), hashes


def write_lock(config: PhotosConfig, revision: str, hashes: Mapping[str, str]) -> None:
    """Write down what a source holds now; comments of somebody else stay."""
    head = [f"# {config.name}: {TITLE}"]
    head += [f"# revision: {revision}", f"# asked: {hub.asked(config)}"] if revision else []
    ours = re.compile(f"# (revision: .*|asked: .*|.*: {re.escape(TITLE)})")
    notes = [line for line in lockfile.read(config.lock)[0] if not ours.fullmatch(line)]
    lockfile.write(config.lock, [*head, *notes], hashes)


def compare(config: PhotosConfig, locked: Mapping[str, str], hashes: Mapping[str, str]) -> None:
    """Raise DataError, naming files and the cure, unless a source is what its lock says."""
    wrong = {
        "changed": sorted(name for name in locked if hashes.get(name, locked[name]) != locked[name]),
        "missing": sorted(set(locked) - set(hashes)),
        "new": sorted(set(hashes) - set(locked)),
    }
    if any(wrong.values()):
        parts = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in wrong.items() if names]
        raise DataError(
            f"{config.path} is not what {config.lock} says: {'; '.join(parts)}. Put the old files back, or, "
            f"if the change is meant, run `python -m moa {config.stage} --accept` (docs/data.md)"
        )


def index_row(found: Found, hashes: Mapping[str, str], revision: str, config: PhotosConfig) -> Row:
    """What the index says of a photo."""
    return {
        "id": found.id,
        "name": found.name,
        "file": found.file,
        "offset": found.offset,
        "size": found.size,
        "sha256": hashes.get(found.name),
        "split": split(found, config),
        "revision": revision or None,
        "reason": found.reason or None,
        "detail": found.detail or None,
    }


def run(config: PhotosConfig, output: Path, accept: bool = False) -> None:
    """Hash a source, hold it against its lock or make the lock, and write the index of its photos.

    Args:
        output: Parquet file, one row a photo: id, place, SHA-256, split.
        accept: write the lock anew from what is there now.

    Raises DataError if there is no such source, or it is not what the lock says.
    """
    revision, asked, locked = read_lock(config.lock)
    fresh = accept or not config.lock.is_file()
    if config.source == "dataset":
        revision = hub.commit(config, "" if fresh else revision, asked)
    found, hashes = hashed(config, revision)
    if fresh:
        write_lock(config, revision, hashes)
    else:
        compare(config, locked, hashes)
    write_rows(output, [index_row(photo, hashes, revision, config) for photo in found], INDEX)
