"""Image grids: subjects by methods, subjects swapped at fixed noise, two subjects in one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from moa.choose import spread
from moa.data.errors import DataError
from moa.data.subjects import read_subjects
from moa.evaluation import samples
from moa.evaluation.samples import Row, open_image
from moa.figures.layout import Column, grid, label, save
from moa.methods import Subject

TITLES = {
    "prior": "prior",
    "fastcomposer": "FastComposer",
    "moa": "MoA",
    "moa_wrong_subject": "MoA, wrong subject",
}
METHODS = ("prior", "fastcomposer", "moa")


class Shelf:
    """Samples of a kind, to be fetched as images by who, what and how."""

    def __init__(self, files: Sequence[str | Path], results: str | Path, split: str, kind: str):
        """Raises DataError if there are none, naming split and kind."""
        self.results = Path(results)
        every = samples.read(files)
        self.rows = [r for r in every if r["split"] == split and r["kind"] == kind]
        if not self.rows:
            raise DataError(f"no samples of split {split}, kind {kind}: generate and score them first")
        self.subjects = list(dict.fromkeys(row["subject"] for row in self.rows))
        self.members = {row["subject"]: row["subjects"] for row in self.rows}
        self.words = {row["subject"]: row["words"] for row in self.rows}
        self.templates = {row["prompt_id"]: _template(row) for row in self.rows}
        self.methods = {row["method"] for row in self.rows}

    def image(self, method: str, subject: str, prompt_id: str, index: int = 0) -> Image.Image | None:
        """The image, of the first training seed if there are several; None if it was not made."""
        for row in self.rows:
            key = (row["method"], row["subject"], row["prompt_id"], row["index"])
            if key == (method, subject, prompt_id, index):
                return open_image(self.results / row["path"])[0]
        return None


def _template(row: Mapping[str, Any]) -> str:
    """A row's prompt with (subject) in the place of the subject's word; with two subjects, (S1) and (S2)."""
    text, shift = row["prompt"], 0
    for number, (start, end) in enumerate(row["spans"], start=1):
        mark = "(subject)" if len(row["spans"]) == 1 else f"(S{number})"
        text = text[: start + shift] + mark + text[end + shift :]
        shift += len(mark) - (end - start)
    return text


def _by_prompt(
    shelf: Shelf, subjects: Sequence[str], prompts: Sequence[str], methods: Sequence[str]
) -> list[Column]:
    """Under each prompt one column a method."""
    return [
        Column(
            TITLES.get(method, method),
            shelf.templates[prompt],
            [shelf.image(method, s, prompt) for s in subjects],
        )
        for prompt in prompts
        for method in methods
        if method in shelf.methods
    ]


def _photos(photos: Mapping[str, Subject], names: Sequence[str]) -> list[Image.Image | None]:
    return [photos[name].image if name in photos else None for name in names]


def benchmark(
    sample_files: Sequence[str | Path],
    subjects: str | Path,
    results: str | Path,
    output: str | Path,
    methods: Sequence[str] = METHODS,
    split: str = "test",
    kind: str = "single",
    rows: int = 6,
    prompts: int = 3,
    cell: int = 128,
) -> None:
    """Draw subjects against methods: the photos, then under each prompt the methods with the same noise.

    Args:
        sample_files: scored rows, of any methods and kinds.
        subjects: the split's subjects file.
        results: the folder that the rows' paths start from.
        output: PNG file.
        methods: columns, in order; those that were not made are left out.
        split: whose images, `test` or `validation`.
        kind: of requests, such as `single`.
        rows, prompts: at most how many subjects and prompts, spread over the protocol's.
        cell: side of a cell in pixels.
    """
    shelf, photos = Shelf(sample_files, results, split, kind), read_subjects(subjects)
    shown = spread(shelf.subjects, rows)
    members = [shelf.members[name] for name in shown]
    titles = ["subject"] if len(members[0]) == 1 else [f"S{n + 1}" for n in range(len(members[0]))]
    columns = [Column(title, "", _photos(photos, [m[n] for m in members])) for n, title in enumerate(titles)]
    columns += _by_prompt(shelf, shown, spread(sorted(shelf.templates), prompts), methods)
    save(grid(columns, cell), output)


def pairs(
    sample_files: Sequence[str | Path],
    subjects: str | Path,
    results: str | Path,
    output: str | Path,
    methods: Sequence[str] = METHODS,
    split: str = "test",
    rows: int = 6,
    prompts: int = 2,
    cell: int = 128,
) -> None:
    """Draw two subjects in one image: both photos, then as `benchmark`.

    Args:
        sample_files: scored rows, of any methods and kinds.
        subjects: the split's subjects file.
        results: the folder that the rows' paths start from.
        output: PNG file.
        methods: columns, in order; those that were not made are left out.
        split: whose images, `test` or `validation`.
        rows, prompts: at most how many pairs and prompts, spread over the protocol's.
        cell: side of a cell in pixels.
    """
    benchmark(sample_files, subjects, results, output, methods, split, "multi", rows, prompts, cell)


def swap(
    sample_files: Sequence[str | Path],
    subjects: str | Path,
    results: str | Path,
    output: str | Path,
    methods: Sequence[str] = ("moa", "fastcomposer"),
    split: str = "test",
    columns: int = 6,
    prompts: int = 3,
    cell: int = 128,
) -> None:
    """Draw a subject swap: along a row noise and prompt stay, the subject changes; the prior leads.

    All subjects share a class word, otherwise the prompt would change too; the more frequent word is shown.

    Args:
        sample_files: scored rows, of any methods and kinds.
        subjects: the split's subjects file.
        results: the folder that the rows' paths start from.
        output: PNG file.
        methods: rows, in order; those that were not made are left out.
        split: whose images, `test` or `validation`.
        columns, prompts: at most how many subjects and prompts, spread over the protocol's.
        cell: side of a cell in pixels.
    """
    shelf, photos = Shelf(sample_files, results, split, "swap"), read_subjects(subjects)
    shown = spread(same_word(shelf.rows), columns)
    wanted = [(m, p) for m in methods if m in shelf.methods for p in spread(sorted(shelf.templates), prompts)]
    titles = ["", *(f"{TITLES.get(method, method)}: {shelf.templates[prompt]}" for method, prompt in wanted)]
    laid = [Column("", "subject", _photos(photos, [name])) for name in shown]
    laid = [
        Column("", "subjects", [*column.images, *(shelf.image(m, name, p) for m, p in wanted)])
        for column, name in zip(laid, shown, strict=True)
    ]
    if "prior" in shelf.methods:
        first = [shelf.image("prior", shown[0], prompt) for _, prompt in wanted]
        laid.insert(0, Column("", "", [label("prior", cell), *first]))
    save(grid(laid, cell, rows=titles), output)


def same_word(rows: Sequence[Row]) -> list[str]:
    """The subjects of the most frequent class word; of the first in the alphabet, if there are several."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        names = groups.setdefault(tuple(row["words"]), [])
        if row["subject"] not in names:
            names.append(row["subject"])
    return min(groups.items(), key=lambda item: (-len(item[1]), item[0]))[1]
