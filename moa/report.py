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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from moa.files import write_atomically

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "snakemake", "numpy", "pandas", "pyarrow")


@dataclass(frozen=True)
class Section:
    """A part of the report: files below the results folder, shown if they are there, and what they mean."""

    title: str
    text: str
    files: tuple[str, ...]


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
        "not hold if it is wholly on the other, and is undecided if the bound lies inside. docs/metrics.md "
        "has the formulas.",
        ("tables/claims.csv", "tables/metrics.csv", "tables/sizes.csv"),
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
        ("tables/router.csv", "figures/router.png", "notebooks/*.ipynb"),
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

LONG = 40  # rows; tables with more are folded away
TEMPLATE = Path(__file__).with_suffix(".html")


def cell(text: str) -> str:
    """A table's cell: numbers, which tables write with four decimals, with as many as a person reads."""
    if re.fullmatch(r"-?\d+", text):
        return f"{int(text):,}"
    if not re.fullmatch(r"-?\d+\.\d{4,}", text):
        return escape(text)
    number = float(text) + 0.0  # no "-0"
    return f"{number:.4g}" if abs(number) < 1 else f"{number:,.2f}"


def folded(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Cells of a table with its head, where x, x_low and x_high are one column: x [low, high]."""
    place = {name: n for n, name in enumerate(rows[0])}
    limits = {n for n in place if n.endswith(("_low", "_high")) and n.rsplit("_", 1)[0] in place}
    kept = [name for name in place if name not in limits]

    def joined(row: Sequence[str], name: str) -> str:
        value = cell(row[place[name]])
        ends = [row[place[end]] for end in (f"{name}_low", f"{name}_high") if end in limits]
        return f"{value} [{', '.join(map(cell, ends))}]" if ends and all(ends) else value

    return [[escape(name) for name in kept], *([joined(row, name) for name in kept] for row in rows[1:])]


def table_html(path: Path) -> str:
    """A CSV file as an HTML table; a long one is folded away."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    table = rows_html(folded(rows))
    if len(rows) <= LONG:
        return table
    return f"<details><summary>{len(rows) - 1} rows</summary>{table}</details>"


def rows_html(rows: Sequence[Sequence[str]]) -> str:
    """Escaped cells, the head first, as an HTML table."""
    head = "".join(f"<th>{name}</th>" for name in rows[0])
    body = "".join(
        f"<tr{' class=published' if 'published' in row else ''}>"
        + "".join(f"<td>{value}</td>" for value in row)
        + "</tr>"
        for row in rows[1:]
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def image_html(data: str, name: str) -> str:
    """An embedded PNG, from base64."""
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'


def notebook_html(notebook: Mapping[str, Any]) -> str:
    """A notebook's texts, pictures and printed lines, without its code."""
    parts = []
    for entry in notebook["cells"]:
        if entry["cell_type"] == "markdown":
            title, _, text = "".join(entry["source"]).partition("\n")
            mark = "h3" if title.startswith("#") else "p"
            parts.append(f"<{mark}>{plain(title.lstrip('# '))}</{mark}><p>{plain(text)}</p>")
        for shown in entry.get("outputs", ()):
            data = shown.get("data", {})
            if "image/png" in data:
                parts.append(image_html("".join(data["image/png"]), "figure of the notebook"))
            elif text := data.get("text/markdown") or shown.get("text"):
                parts.append(printed_html("".join(text)))
    return "".join(parts)


def plain(text: str) -> str:
    """Markdown's text without its marks, escaped."""
    return escape(re.sub(r"[`*]", "", text))


def printed_html(text: str) -> str:
    """What a notebook printed: a Markdown table as an HTML table, the rest as it stands."""
    lines = text.strip().splitlines()
    if len(lines) < 3 or not all(line.startswith("|") for line in lines):
        return f"<pre>{escape(text)}</pre>"
    rows = [[plain(value.strip()) for value in line.strip("|").split("|")] for line in lines]
    return rows_html([rows[0], *rows[2:]])


def file_html(path: Path) -> str:
    """A file of a run as HTML: CSV as a table, PNG embedded, the rest as text."""
    if path.suffix == ".csv":
        return table_html(path)
    if path.suffix == ".png":
        return image_html(base64.b64encode(path.read_bytes()).decode(), path.name)
    if path.suffix == ".ipynb":
        return notebook_html(json.loads(path.read_text(encoding="utf-8")))
    return f"<pre>{escape(path.read_text(encoding='utf-8'))}</pre>"


def _is_shown(path: Path, shown: Sequence[Path]) -> bool:
    """Whether a file, or a folder that it is in, is among those to be shown; without any, all are."""
    return not shown or not {path, *path.parents}.isdisjoint(shown)


def section(results: Path, part: Section, shown: Sequence[Path]) -> dict[str, Any] | None:
    """What the page's template shows of a section; None if none of its files is there and to be shown."""
    there = [path for pattern in part.files for path in sorted(results.glob(pattern))]
    files = [path for path in there if _is_shown(path, shown)]
    if not files:
        return None
    parts = [(path.relative_to(results).as_posix(), file_html(path)) for path in files]
    return {"title": part.title, "text": part.text, "parts": parts}


def installed(package: str) -> str | None:
    """A package's version; None where it is not installed, as Snakemake is not inside a conda environment."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
    versions: list[tuple[str, str]] = [
        ("Python", platform.python_version()),
        ("platform", platform.platform()),
    ]
    versions += [(name, found) for name in PACKAGES if (found := installed(name))]
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
        versions=versions,
    )
    write_atomically(output, lambda path: path.write_text(text, encoding="utf-8"))
