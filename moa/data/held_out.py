"""Validation subjects: people who stand alone in held-out photos.

Entry point, called by `python -m moa held-out-subjects`:

    run(config, records, output)      validation shards of records → subjects
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moa.data.errors import DataError
from moa.data.records import RECORD, SUBJECT, Row, read_at, read_rows, write_rows
from moa.evaluation.protocol import spread_by_word


@dataclass(frozen=True)
class HeldOutConfig:
    """Who of the held-out photos is a validation subject."""

    subjects: int = 24  # at most; the protocol chooses among them
    words: tuple[str, ...] = ("man", "woman")  # what captions may call them

    def __post_init__(self) -> None:
        if self.subjects < 1 or not self.words:
            raise ValueError(f"subjects ({self.subjects}) must be at least 1, and words name somebody")


@dataclass(frozen=True)
class Candidate:
    """Somebody who is alone in a photo."""

    id: str
    word: str
    shard: Path
    place: int  # of the record in the shard


def candidates(shard: Path, config: HeldOutConfig) -> list[Candidate]:
    """The people of a shard's records of one person, whom the caption calls by one of `words`."""
    rows = enumerate(read_rows(shard, RECORD, ["id", "segments"]))
    alone = [(place, row["id"], row["segments"][0]) for place, row in rows if len(row["segments"]) == 1]
    found = [Candidate(name, person["word"].lower(), shard, place) for place, name, person in alone]
    return [candidate for candidate in found if candidate.word in config.words]


def subject(person: Candidate) -> Row:
    """The subject's row, with the photo of the record."""
    [row] = read_at(person.shard, RECORD, [person.place])
    return {name: row[name] for name in ("id", "image", "sha256")} | {
        "identity": person.id,
        "word": person.word,
    }


def run(config: HeldOutConfig, records: Sequence[Path], output: Path) -> None:
    """Write subjects from all over the records, the words in turn. Raises DataError if there is nobody."""
    found = [person for shard in records for person in candidates(shard, config)]
    if not found:
        raise DataError(
            f"nobody who is called {' or '.join(config.words)} stands alone in {len(records)} shards"
        )
    ordered = sorted(found, key=lambda person: person.id)
    chosen = {person.id for person in spread_by_word(ordered, min(config.subjects, len(ordered)))}
    write_rows(output, [subject(person) for person in found if person.id in chosen], SUBJECT)
