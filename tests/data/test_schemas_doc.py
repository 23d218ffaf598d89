"""The written schemas are what others build on; they must list exactly the columns that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moa.data import records
from moa.data.archive import ARCHIVED
from moa.data.errors import REASONS
from moa.data.parser import PHRASES
from moa.data.sources import lock
from moa.data.sources.reasons import QUARANTINED
from moa.evaluation import features, maps, measures, preserved, samples

TEXT = (Path(__file__).parents[2] / "docs" / "schemas.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))


def documented(section: str) -> list[str]:
    """First cells of a section's tables."""
    return re.findall(r"^\| `(\w+)` \|", SECTIONS[section], re.MULTILINE)


@pytest.mark.parametrize("name", ["raw", "truth", "caption", "segment", "record", "subject"])
def test_every_column_is_explained_in_its_order(name):
    assert documented(name) == getattr(records, name.upper()).names


def test_rejected_rows_and_their_reasons_are_explained():
    assert documented("rejected") == [*records.REJECTED.names, *REASONS]
    assert all(f"| `{reason}` | {meaning} |" in TEXT for reason, meaning in REASONS.items())


def test_the_index_and_the_reasons_for_quarantine_are_explained():
    assert documented("index") == lock.INDEX.names
    assert documented("quarantined") == [*QUARANTINED]
    assert all(
        f"| `{reason}` | {meaning} |" in SECTIONS["quarantined"] for reason, meaning in QUARANTINED.items()
    )


def test_phrases_and_archived_files_are_explained():
    assert documented("phrases") == PHRASES.names
    assert documented("archived") == ARCHIVED.names


def test_samples_are_explained():
    assert set(documented("request, made, sample")) == set(samples.SAMPLE.names)


@pytest.mark.parametrize(
    ("section", "schema"),
    [
        ("kept", samples.KEPT),
        ("preserved", preserved.PRESERVED),
        ("measure", measures.MEASURE),
        ("features", features.FEATURES),
        ("router", maps.ROUTER),
    ],
)
def test_what_is_compared_is_explained(section, schema):
    columns = re.findall(r"^\| (`.+?`) \|", SECTIONS[section], re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(columns)) == schema.names


def test_parts_of_lists_are_explained():
    lists = [
        (records.SEGMENT, "segment", "segments"),
        (records.RECORD, "record", "segments"),
        (PHRASES, "phrases", "phrases"),
        (PHRASES, "phrases", "models"),
    ]
    for schema, section, column in lists:
        for part in schema.field(column).type.value_type:
            assert f"`{part.name}`" in SECTIONS[section]
