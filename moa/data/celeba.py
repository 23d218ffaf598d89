"""The test subjects of a protocol: one photo of CelebA each, locked by SHA-256 at the first fetch.

Entry point, called by `python -m moa celeba-subjects`:

    run(config, protocol, output, accept)      CelebA, in a folder or a data set → the subjects
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moa.data.errors import DataError
from moa.data.records import SUBJECT, Row, sha256, write_rows
from moa.data.sources import hub
from moa.data.sources.celeba import SubjectsConfig, check_files, check_words, choose, find, identity
from moa.data.sources.lock import compare, read_lock, write_lock
from moa.data.sources.quarantine import Quarantined, examine
from moa.evaluation import protocol as protocols

SMALLEST = 160  # pixels of a photo's shorter side: what the judge of identities looks at
Photos = dict[str, tuple[str, bytes]]  # subject: what the lock calls the photo, and its bytes


def from_folder(words: Mapping[str, str], config: SubjectsConfig) -> Photos:
    """The subjects' photos in a folder. Raises DataError."""
    root, files = Path(config.path), find(words, config)
    check_words(words, files, root)
    try:
        return {subject: (name, (root / name).read_bytes()) for subject, name in files.items()}
    except OSError as error:
        raise DataError(f"{config.photos().key}: a subject's photo cannot be read ({error})") from error


def from_dataset(words: Mapping[str, str], config: SubjectsConfig, revision: str) -> Photos:
    """The subjects' photos among a data set's rows, which are called by their numbers. Raises DataError."""
    photos = config.photos()
    loaded = hub.load(photos, revision)
    listed: dict[int, list[str]] = {}
    for row, person in enumerate(loaded[config.identity_column]):
        listed.setdefault(_number(person, config), []).append(str(row))
    rows = choose(words, listed, config)
    try:
        return {
            subject: (f"row {row}: {identity(subject)}", hub.read(loaded, int(row), photos))
            for subject, row in rows.items()
        }
    except hub.LeadsOut as why:
        raise DataError(f"{photos.key}.path: {config.path} cannot be used ({why})") from why


def _number(person: Any, config: SubjectsConfig) -> int:
    try:
        return int(person)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{config.photos().key}.identity_column: {person!r} is no identity of CelebA"
        ) from error


def subject_row(subject: str, word: str, name: str, data: bytes, config: SubjectsConfig) -> Row:
    """One subject. Raises DataError for a photo that cannot be used."""
    try:
        examine(data, replace(config.photos(), min_side=SMALLEST))
    except Quarantined as why:
        raise DataError(f"{config.path}: {name}, the photo of {subject}, cannot be used ({why})") from why
    return {
        "id": subject,
        "identity": str(identity(subject)),
        "word": word,
        "image": {"bytes": data, "path": name.rpartition("/")[2]},
        "sha256": sha256(data),
    }


def run(config: SubjectsConfig, protocol: Path, output: Path, accept: bool = False) -> None:
    """Write a photo of each test subject of a protocol, the same as at the first fetch.

    Args:
        output: Parquet file of subjects.
        accept: write the lock anew from what is there now.

    Raises DataError if a subject is not there, or not what the lock says; ValueError for a protocol that
    does not say what its subjects are called.
    """
    words = protocols.load(protocol).split("test").words
    if not words:
        raise ValueError(f"{protocol}: test.subjects must list ids below the words that prompts call them")
    check_files(words, config)
    photos = config.photos()
    revision, asked, locked = read_lock(config.lock)
    fresh = accept or not config.lock.is_file()
    if config.source == "dataset":
        revision = hub.commit(photos, "" if fresh else revision, asked)
        found = from_dataset(words, config, revision)
    else:
        found = from_folder(words, config)
    rows = [subject_row(subject, words[subject], *photo, config) for subject, photo in found.items()]
    hashes = {name: sha256(data) for name, data in found.values()}
    if fresh:
        write_lock(photos, revision, hashes)
    else:
        compare(photos, locked, hashes)
    write_rows(output, rows, SUBJECT)
