"""Which photos of CelebA a protocol's test subjects are. Read by Snakemake itself: nothing heavy is imported.

A protocol names a subject `identity/file`, as FastComposer's folder of them does: `000001/000000023`. The
identity is CelebA's number. The file is FastComposer's own count, which CelebA knows nothing of, so a copy
of CelebA is read at the photo that `files` names, or else at the identity's first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from moa.data.errors import DataError
from moa.data.sources import listing
from moa.data.sources.config import PhotosConfig
from moa.data.sources.listing import SUFFIXES
from moa.lockfile import read_lines

IMAGES = ("img_celeba", "Img/img_celeba", "img_align_celeba", "Img/img_align_celeba")  # uncropped ones first
IDENTITIES = ("identity_CelebA.txt", "Anno/identity_CelebA.txt")  # "000001.jpg 2880"
ATTRIBUTES = ("list_attr_celeba.txt", "Anno/list_attr_celeba.txt")  # "000001.jpg -1  1 …", names in line 2
SEXES = {"man": "1", "woman": "-1"}  # what the attribute Male says of them


@dataclass(frozen=True)
class SubjectsConfig:
    """Where the protocol's test subjects are."""

    path: str  # folder of CelebA, or of `identity/file` photos; of `dataset` a folder or a name on the hub
    lock: Path  # text file with the SHA-256 of the subjects' photos at the first fetch; keep it
    source: Literal["folder", "dataset"] = "folder"
    files: Mapping[str, str] = field(default_factory=dict)  # subject: CelebA's file, or a data set's row
    revision: str | None = None  # of a data set on the hub; a commit pins it
    dataset_split: str = "train"  # which split of the data set is read; "all" for all
    image_column: str = "image"
    identity_column: str = "celeb_id"

    def photos(self) -> PhotosConfig:
        """The same for what reads and locks photos."""
        return _Photos(
            source=self.source,
            path=self.path,
            name="celeba",
            lock=self.lock,
            revision=self.revision,
            dataset_split=self.dataset_split,
            image_column=self.image_column,
            id_column=self.identity_column,
        )


class _Photos(PhotosConfig):
    key: ClassVar[str] = "data.subjects.test"
    stage: ClassVar[str] = "celeba-subjects"


def identity(subject: str) -> int:
    """CelebA's number of a subject of the protocol. Raises DataError."""
    number = subject.partition("/")[0]
    if not number.isdecimal():
        raise DataError(f"test.subjects of the protocol: {subject!r} is no identity/file of CelebA")
    return int(number)


def choose(
    subjects: Iterable[str], listed: Mapping[int, list[str]], config: SubjectsConfig
) -> dict[str, str]:
    """The photo of each subject: the one of `files`, else its identity's first.

    `listed` has the photos of every identity, in order. Raises DataError naming subject and key.
    """
    chosen = {}
    for subject in subjects:
        names = listed.get(identity(subject), [])
        if not names:
            raise DataError(f"{_Photos.key}: {config.path} has no photo of identity {identity(subject)}")
        chosen[subject] = config.files.get(subject, names[0])
        if chosen[subject] not in names:
            raise DataError(
                f"{_Photos.key}.files: {chosen[subject]!r} is no photo of identity {identity(subject)}, "
                f"which has {', '.join(names[:5])}, …"
            )
    return chosen


def check_files(subjects: Iterable[str], config: SubjectsConfig) -> None:
    """Raise DataError if `files` names somebody whom the protocol does not."""
    unknown = sorted(set(config.files) - set(subjects))
    if unknown:
        raise DataError(f"{_Photos.key}.files: {unknown[0]} is no test subject of the protocol")


def find(subjects: Iterable[str], config: SubjectsConfig) -> dict[str, str]:
    """The file of each subject, below the folder `config.path`. Raises DataError naming subject and cure."""
    subjects, root = list(subjects), Path(config.path)
    if not root.is_dir():
        raise DataError(f"{_Photos.key}.path: there is no folder {root}; put CelebA there or correct it")
    exact = {subject: _exact(root, subject) for subject in subjects}
    if twice := next((exact[subject] for subject in config.files if exact.get(subject)), None):
        raise DataError(
            f"{_Photos.key}.files: {root} has {twice}, the protocol's own file; take one of the two away"
        )
    others = [subject for subject, file in exact.items() if not file]
    if not others:
        return exact
    folder = next((name for name in IMAGES if (root / name).is_dir()), None)
    people = next((root / name for name in IDENTITIES if (root / name).is_file()), None)
    if not folder or not people:
        raise DataError(
            f"{_Photos.key}.path: {root} has neither {others[0]}.jpg nor CelebA's {IDENTITIES[0]} and "
            f"{IMAGES[0]} or {IMAGES[2]}; see docs/data.md"
        )
    return exact | {s: f"{folder}/{file}" for s, file in choose(others, _identities(people), config).items()}


def _exact(root: Path, subject: str) -> str:
    """A subject's photo where FastComposer has it, `000001/000000023.jpg`; "" if it is not there."""
    return next((subject + end for end in sorted(SUFFIXES) if (root / (subject + end)).is_file()), "")


def _identities(path: Path) -> dict[int, list[str]]:
    """CelebA's files by identity, in order. Raises DataError naming a wrong line."""
    listed: dict[int, list[str]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        parts = line.split()
        if parts and (len(parts) != 2 or not parts[1].isdecimal()):
            raise DataError(f"{path}, line {number} is no file and identity: {line!r}")
        if parts:
            listed.setdefault(int(parts[1]), []).append(parts[0])
    return {person: sorted(names) for person, names in listed.items()}


def check_words(words: Mapping[str, str], files: Mapping[str, str], root: Path) -> None:
    """Raise DataError if CelebA's own attributes, where they are there, call a subject otherwise."""
    path = next((root / name for name in ATTRIBUTES if (root / name).is_file()), None)
    lines = read_lines(path) if path else []
    if len(lines) < 2 or "Male" not in lines[1].split():
        return
    column = lines[1].split().index("Male") + 1
    male = {parts[0]: parts[column] for parts in map(str.split, lines[2:]) if len(parts) > column}
    for subject, file in files.items():
        said = male.get(Path(file).name)
        if said and SEXES.get(words[subject], said) != said:
            raise DataError(
                f"{subject} is a {words[subject]} in the protocol, but {path} says Male {said} of {file}: "
                "another person than the protocol means"
            )


def stamp(subjects: Iterable[str], config: SubjectsConfig) -> str:
    """What changes when a subject's file does, without reading it; "absent" if it cannot be told (yet).

    Of a data set in a folder any of its files counts; one on the hub is pinned by the lock.
    """
    if config.source == "dataset":
        return listing.stamp(config.photos(), {"test": 1})
    try:
        files = find(subjects, config)
        known = [(name, (Path(config.path) / name).stat()) for name in files.values()]
    except (DataError, OSError):  # the job itself says what is wrong
        return "absent"
    text = "".join(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n" for name, status in known)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
