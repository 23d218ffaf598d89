"""Validation subjects: people who stand alone in held-out photos.

Entry point, called by `python -m moa held-out-subjects`:

    run(config, records, output)      validation shards of records → subjects
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moa.data.errors import DataError
from moa.data.records import RECORD, SUBJECT, Row, read_rows, write_rows
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


def candidates(records: Sequence[Row], config: HeldOutConfig) -> list[Candidate]:
    """The people of records of one person, whom the caption calls by one of `words`."""
    alone = [(row["id"], row["segments"][0]["word"].lower()) for row in records if len(row["segments"]) == 1]
    return [Candidate(name, word) for name, word in alone if word in config.words]


def run(config: HeldOutConfig, records: Sequence[Path], output: Path) -> None:
    """Write subjects from all over the records, the words in turn. Raises DataError if there is nobody."""
    found = [person for shard in records for person in candidates(read_rows(shard, RECORD), config)]
    if not found:
        raise DataError(
            f"nobody who is called {' or '.join(config.words)} stands alone in {len(records)} shards"
        )
    ordered = sorted(found, key=lambda person: person.id)
    chosen = {p.id: p.word for p in spread_by_word(ordered, min(config.subjects, len(ordered)))}
    rows = [row for shard in records for row in read_rows(shard, RECORD) if row["id"] in chosen]
    subjects = [
        {name: row[name] for name in ("id", "image", "sha256")}
        | {"identity": row["id"], "word": chosen[row["id"]]}
        for row in rows
    ]
    write_rows(output, subjects, SUBJECT)
