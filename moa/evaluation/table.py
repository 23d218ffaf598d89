"""A table, and its forms: CSV for programs, Markdown and LaTeX for people."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa.evaluation.statistics import Interval
from moa.files import write_atomically

PARAGRAPH = 40  # characters; LaTeX columns with longer cells are paragraphs
PAGE = 40  # rows; longer LaTeX tables go over pages


@dataclass(frozen=True)
class Table:
    """Named columns and their rows; None and NaN are empty cells."""

    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    notes: tuple[str, ...] = ()  # below the Markdown and LaTeX forms


def cell(value: Any) -> str:
    """A value as text: six decimals for floats, nothing for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def to_csv(table: Table) -> str:
    """RFC 4180 but for line ends, which are those of Unix."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([cell(row.get(name)) for name in table.columns] for row in table.rows)
    return text.getvalue()


def _pretty(table: Table) -> tuple[list[str], list[list[str]]]:
    """Columns and cells for reading: three decimals, `x_low` and `x_high` folded into x as [low, high]."""

    def short(value: float) -> str:
        return f"{round(value, 3) + 0.0:.3f}"  # without the sign of a rounded zero

    folded = [c for c in table.columns if {f"{c}_low", f"{c}_high"} <= set(table.columns)]
    hidden = {f"{name}_{side}" for name in folded for side in ("low", "high")}
    shown = [name for name in table.columns if name not in hidden]

    def text(row: Mapping[str, Any], name: str) -> str:
        value = row.get(name)
        plain = short(value) if isinstance(value, float) and not math.isnan(value) else cell(value)
        ends = [
            row[f"{name}_{side}"]
            for side in ("low", "high")
            if name in folded and cell(row.get(f"{name}_{side}"))
        ]
        return f"{plain} [{short(ends[0])}, {short(ends[1])}]" if len(ends) == 2 else plain

    return shown, [[text(row, name) for name in shown] for row in table.rows]


def to_markdown(table: Table) -> str:
    """A pipe table, intervals in brackets, notes below."""
    names, rows = _pretty(table)
    lines = [f"| {' | '.join(r)} |" for r in (names, ["---"] * len(names), *rows)]
    return "\n".join([*lines, *(f"\n{note}" for note in table.notes)]) + "\n"


def to_latex(table: Table) -> str:
    """A booktabs tabular, or longtable, intervals in brackets, notes as comments.

    Columns of long texts are paragraphs, which share the line.
    """
    names, rows = _pretty(table)
    body = [" & ".join(map(_escape, r)) + r" \\" for r in rows]
    head = " & ".join(map(_escape, names)) + r" \\"
    long = [max(map(len, column)) > PARAGRAPH for column in zip(names, *rows, strict=True)]
    paragraph = rf"p{{{0.75 / max(1, sum(long)):.2f}\linewidth}}"
    layout = "".join(paragraph if wide else "l" for wide in long)
    kind = "longtable" if len(rows) > PAGE else "tabular"
    lines = [rf"\begin{{{kind}}}{{{layout}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*lines, rf"\end{{{kind}}}", *(f"% {note}" for note in table.notes)]) + "\n"


_SIGNS = {"<": "$<$", ">": "$>$", "−": "$-$", "≠": r"$\neq$", "±": r"$\pm$"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def _escape(text: str) -> str:
    return "".join(f"\\{c}" if c in "&%$#_{}" else _SIGNS.get(c, c) for c in text)


FORMS: dict[str, Callable[[Table], str]] = {".csv": to_csv, ".md": to_markdown, ".tex": to_latex}


def save(table: Table, path: str | Path) -> None:
    """Write a table; the ending, .csv, .md or .tex, says in which form."""
    path = Path(path)
    text = FORMS[path.suffix](table)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def limits(name: str, value: Interval) -> dict[str, float]:
    """An interval as the cells `name`, `name_low` and `name_high`."""
    return {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}


def joined(parts: Iterable[Table]) -> Table:
    """Tables of the same columns, one below the other."""
    tables = list(parts)
    return Table(tables[0].columns, [row for table in tables for row in table.rows], tables[0].notes)
