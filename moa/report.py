"""One HTML file that shows a whole run: tables, figures, notebook, data, configuration and versions.

Entry point, called by `python -m moa report`:

    run(results, config, output)

Everything is embedded, so the file can be sent to someone. It only reads what other stages wrote.
"""

from __future__ import annotations

import base64
import csv
import json
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token

from moa import versions
from moa.files import write_atomically


@dataclass(frozen=True)
class Section:
    """A part of the report: files below the results folder, shown if they are there, and what they mean."""

    title: str
    text: str
    files: tuple[str, ...]
    tallied: str = ""  # column of the first table whose values the heading counts


SECTIONS = (
    Section(
        "Result",
        "IP: identity preservation, the cosine between the generated and the real face, 0..1. PC: prompt "
        "consistency, the cosine between image and prompt. Intervals are 95 %, with the subject as the unit. "
        "Rows whose source is published were measured by others on photographs: they are for orientation "
        "and cannot be compared with ours in the miniature world.",
        ("tables/main.csv", "figures/scores.png", "figures/benchmark.png"),
    ),
    Section(
        "Differences, and the way from floor to ceiling",
        "Differences are paired: the same subject, prompt and noise. prior and moa_wrong_subject are "
        "floors, ceiling is the true subject drawn again and sent through the autoencoder.",
        ("tables/differences.csv", "tables/progress.csv"),
    ),
    Section(
        "What the paper claims",
        "A claim holds if the whole 95 % interval of its effect is on the claimed side of the bound, does "
        "not hold if it is wholly on the other, and is undecided if the bound lies inside. least and most, "
        "where there are several trainings, are with one alone. docs/metrics.md has the formulas.",
        ("tables/claims.csv", "tables/metrics.csv", "tables/sizes.csv"),
        tallied="verdict",
    ),
    Section("Two subjects", "", ("tables/multi.csv", "figures/pairs.png")),
    Section(
        "Subject swap: what stays when the subject changes",
        "Along a row noise and prompt stay and the subject changes. PSNR and SSIM compare pixels outside "
        "both subjects' dilated masks; pairs with an image in which nobody was found are left out.",
        ("tables/context.csv", "figures/swap.png"),
    ),
    Section(
        "Router",
        "Weight of the frozen prior, inside and beside the subjects, by layer and timestep.",
        ("tables/router.csv", "tables/router_timesteps.csv", "figures/router.png", "notebooks/*.ipynb"),
    ),
    Section(
        "Beside published numbers",
        "Measured less published. Published numbers are of photographs, with other judges than the "
        "miniature's, so the difference of two methods says more than that of one.",
        ("tables/table3.csv",),
    ),
    Section(
        "Trainings with different seeds",
        "least, most and sd are over the trainings' means; intervals are over subjects.",
        ("tables/seeds.csv",),
    ),
    Section(
        "Ablations",
        "On validation subjects. A difference is paired: to the method as it is, with the same noise.",
        ("tables/ablations.csv",),
    ),
    Section("By kind of prompt", "", ("tables/groups.csv",)),
    Section(
        "Training",
        "The curves of two methods cannot be compared: timesteps, masks and what is trained differ. "
        "FastComposer's denoising loss takes the mask in half of its batches only, hence its noise.",
        ("figures/training.png", "train/moa/*.png", "train/fastcomposer/*.png"),
    ),
    Section("Cost on this machine", "", ("tables/cost.csv",)),
    Section(
        "Data",
        "The annotators' errors are measured against the renderer's truth, where there is one.",
        ("data/card.md", "data/quarantine.csv", "tables/annotation.csv", "data/card.png"),
    ),
)

CAPTIONS = {  # pattern of files: what is said once, above the first of them
    "train/*/step-*.png": "What a method draws while it is trained, one picture a validation; its name "
    "says after how many training steps. A row is a validation subject. The first column is the "
    "subject's photo; then each prompt has two columns: what the frozen prior draws without it, and what "
    "the method draws with it, from the same noise. Prompts and noise stay the same from row to row and "
    "from picture to picture: what changes from one picture to the next was learned in between.",
}
PLURAL = {"holds": "hold", "does not hold": "do not hold", "undecided": "are undecided"}  # of verdicts
LONG = 30  # rows; tables with more are folded away
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?|-?inf|nan")
READABLE = re.compile(
    r"[-−]?\d[\d,]*(\.\d+)?(e[+-]?\d+|%)?( \[.*\])?|-?inf|nan"
)  # as tables for people write it
NO_NUMBER = ("", "not measured")  # what a column of numbers may hold, too
TEMPLATE = Path(__file__).with_suffix(".html")
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")


@dataclass(frozen=True)
class Column:
    """A column of an HTML table: its head and cells, as HTML, and the class that aligns them."""

    head: str
    cells: Sequence[str]
    aligned: str = "text"  # or "number", "limits"


def decimals(values: Sequence[str]) -> int | None:
    """The decimals that all numbers of a column get; None for a column of anything else.

    As many as the longest number has, but no more than a person reads: three, fewer where most numbers are 10
    and larger.
    """
    numbers = [value for value in values if value not in NO_NUMBER]
    if not numbers or not all(map(NUMBER.fullmatch, numbers)):
        return None
    longest = max(3 if "e-" in value else len(value.partition(".")[2]) for value in numbers)
    sizes = sorted(size for value in numbers if isfinite(size := abs(float(value))) and size)
    middle = sizes[len(sizes) // 2] if sizes else 0.0
    return min(longest, 3 if middle < 10 else 2 if middle < 100 else 1)


def cell(text: str, digits: int | None) -> str:
    """A table's cell as HTML; with `digits`, a number with so many decimals and its thousands apart."""
    if digits is None or text in NO_NUMBER or not isfinite(value := float(text)):
        return escape(text)
    shown = f"{value:,.{digits}f}"
    return (shown if shown.strip("-0.") else shown.removeprefix("-")).replace("-", "−")


def columns(rows: Sequence[Sequence[str]]) -> Iterator[Column]:
    """The columns of a CSV file with its head; limits x_low and x_high stand behind x, as [low, high]."""
    values = {name: [row[n] for row in rows[1:]] for n, name in enumerate(rows[0])}
    bounded = [name for name in values if {f"{name}_low", f"{name}_high"} <= set(values)]
    limits = {f"{name}{end}" for name in bounded for end in ("_low", "_high")}
    for name in (name for name in values if name not in limits):
        ends = [values[f"{name}{end}"] for end in ("_low", "_high")] if name in bounded else []
        digits = decimals([value for part in (values[name], *ends) for value in part])
        shown = [cell(value, digits) for value in values[name]]
        yield Column(escape(name), shown, _aligned(values[name]))
        if ends:
            pairs = zip(*ends, strict=True)
            shown = [f"[{cell(a, digits)}, {cell(b, digits)}]" if a and b else "" for a, b in pairs]
            yield Column("[low, high]", shown, "limits")


def _aligned(values: Sequence[str]) -> str:
    """The class of a column with these texts: numbers to the right, with digits of one width."""
    given = [value for value in values if value not in NO_NUMBER]
    return "number" if given and all(map(READABLE.fullmatch, given)) else "text"


def read_table(path: Path) -> list[list[str]]:
    """The rows of a CSV file, its head first."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def table_html(path: Path) -> str:
    """A CSV file as an HTML table; a long one is folded away."""
    rows = read_table(path)
    table = columns_html(list(columns(rows)))
    if len(rows) - 1 <= LONG:
        return table
    return f"<details><summary>{len(rows) - 1} rows</summary>{table}</details>"


def columns_html(table: Sequence[Column]) -> str:
    """Columns as an HTML table; rows that were published are greyed, and a head without names is left out."""
    head = "".join(f'<th class="{column.aligned}">{column.head}</th>' for column in table)
    body = "".join(
        f"<tr{' class=published' if 'published' in row else ''}>"
        + "".join(
            f'<td class="{column.aligned}">{value}</td>' for column, value in zip(table, row, strict=True)
        )
        + "</tr>"
        for row in zip(*(column.cells for column in table), strict=True)
    )
    head = f"<tr>{head}</tr>" if any(column.head for column in table) else ""
    return f'<div class="wide"><table>{head}{body}</table></div>'


def tally(path: Path, column: str) -> str:
    """How often each value of a table's column comes, as words: "14 hold, 5 do not hold"."""
    head, *rows = read_table(path)
    counts = Counter(row[head.index(column)] for row in rows)
    order = [*PLURAL, *sorted(set(counts) - set(PLURAL))]
    return ", ".join(
        f"{counts[value]} {value if value not in PLURAL or counts[value] == 1 else PLURAL[value]}"
        for value in order
        if counts[value]
    )


def image_html(data: str, name: str) -> str:
    """An embedded PNG, from base64."""
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'


def notebook_html(notebook: Mapping[str, Any]) -> str:
    """A notebook's texts, pictures and printed lines, without its code."""
    parts = []
    for entry in notebook["cells"]:
        if entry["cell_type"] == "markdown":
            parts.append(markdown_html("".join(entry["source"])))
        for shown in entry.get("outputs", ()):
            data = shown.get("data", {})
            if "image/png" in data:
                parts.append(image_html("".join(data["image/png"]), "figure of the notebook"))
            elif text := data.get("text/markdown"):
                parts.append(markdown_html("".join(text)))
            elif text := shown.get("text"):
                parts.append(f"<pre>{escape(''.join(text))}</pre>")
    return "".join(parts)


def markdown_html(text: str) -> str:
    """Markdown as HTML: headings below the page's, tables as of CSV files, no HTML let through."""
    tokens = MARKDOWN.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1:]) + 2)}"
    html, start = "", 0
    for n, token in enumerate(tokens):
        if token.type == "table_open":
            html, start = html + _rendered(tokens[start:n]), n
        elif token.type == "table_close":
            html, start = html + _markdown_table(tokens[start:n]), n + 1
    return html + _rendered(tokens[start:])


def _rendered(tokens: Sequence[Token]) -> str:
    """Tokens of Markdown as HTML."""
    return str(MARKDOWN.renderer.render(tokens, MARKDOWN.options, {}))


def _markdown_table(tokens: Sequence[Token]) -> str:
    """A table from its tokens; the cells are shown as they are, for whoever wrote them rounded them."""
    rows: list[list[Token]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append(token)
    table = [
        Column(
            _rendered(cells[:1]),
            [_rendered([c]) for c in cells[1:]],
            _aligned([c.content for c in cells[1:]]),
        )
        for cells in zip(*rows, strict=True)
    ]
    return columns_html(table)


def file_html(path: Path) -> str:
    """A file of a run as HTML: CSV as a table, PNG embedded, Markdown as a page, the rest as text."""
    if path.suffix == ".csv":
        return table_html(path)
    if path.suffix == ".png":
        return image_html(base64.b64encode(path.read_bytes()).decode(), path.name)
    if path.suffix == ".ipynb":
        return notebook_html(json.loads(path.read_text(encoding="utf-8")))
    text = path.read_text(encoding="utf-8")
    return markdown_html(text) if path.suffix == ".md" else f"<pre>{escape(text)}</pre>"


def captions(names: Sequence[str]) -> dict[str, str]:
    """Of these files, those that a caption stands above: the first that its pattern fits."""
    fitting = {caption: [name for name in names if fnmatch(name, p)] for p, caption in CAPTIONS.items()}
    return {found[0]: caption for caption, found in fitting.items() if found}


def _is_shown(path: Path, shown: Sequence[Path]) -> bool:
    """Whether a file, or a folder that it is in, is among those to be shown; without any, all are."""
    return not shown or not {path, *path.parents}.isdisjoint(shown)


def section(results: Path, part: Section, shown: Sequence[Path]) -> dict[str, Any] | None:
    """What the page's template shows of a section; None if none of its files is there and to be shown."""
    there = [path for pattern in part.files for path in sorted(results.glob(pattern))]
    files = [path for path in there if _is_shown(path, shown)]
    if not files:
        return None
    names = [path.relative_to(results).as_posix() for path in files]
    said = captions(names)
    parts = [(name, said.get(name, ""), file_html(path)) for name, path in zip(names, files, strict=True)]
    counts = tally(files[0], part.tallied) if part.tallied and names[0] == part.files[0] else ""
    return {"title": part.title, "counts": counts, "text": part.text, "parts": parts}


def run(results: Path, config: str, output: Path, shown: Sequence[Path] = ()) -> None:
    """Write the report.

    Args:
        results: folder of a run.
        config: its whole configuration as JSON.
        output: HTML file to write.
        shown: files and folders of the run, so that what an earlier configuration left is not shown; by
            default everything that is there.
    """
    settings = json.loads(config)
    machine = {"Python": platform.python_version(), "platform": platform.platform()}
    notebooks = sorted((results / "notebooks").glob("*.ipynb"))
    notebooks = [path for path in notebooks if _is_shown(path, shown)]
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    text = page.render(
        title=f"Mixture-of-Attention, preset {settings['preset']}",
        sections=[entry for part in SECTIONS if (entry := section(results, part, shown))],
        notebook=notebooks[0].relative_to(results).as_posix() if notebooks else "",
        config=json.dumps(settings, indent=1),
        versions=machine | versions.packages(),
        date=datetime.now(UTC).date().isoformat(),
        commit=versions.commit() or "",
        changed=len(versions.changed()),
    )
    write_atomically(output, lambda path: path.write_text(text, encoding="utf-8"))
