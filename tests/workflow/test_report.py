"""The report shows what there is, whole and readable, and escapes what it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from moa import report, versions


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for folder in ("tables", "figures", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tables/main.csv").write_text(
        "method,source,images,ip,found\nmoa,measured,150,0.81234,\n<b>,published,,0.5,\n"
    )
    (tmp_path / "tables/claims.csv").write_text("claim,section,holds_if,verdict\nc,4.2,> 0,does not hold\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "figures/benchmark.png")
    cells = [
        {"cell_type": "markdown", "source": ["# Router\n", "A < B"]},
        {
            "cell_type": "code",
            "source": ["1"],
            "outputs": [{"data": {"image/png": "AAAA"}}, {"text": ["five\n"]}],
        },
    ]
    (tmp_path / "notebooks/router_maps.ipynb").write_text(json.dumps({"cells": cells}))
    return tmp_path


def test_everything_is_in_one_file(results: Path) -> None:
    report.run(results, json.dumps({"preset": "tiny", "note": "<i>"}), results / "report.html")
    page = (results / "report.html").read_text()
    assert '<td class="number">0.812</td>' in page
    assert '<td class="number">150</td>' in page
    assert page.count("data:image/png;base64,") == 2
    assert re.search(r"<h3>Router</h3>\s*<p>A &lt; B</p>", page)
    assert "five" in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert '<td class="text">&gt; 0</td><td class="text">does not hold</td>' in page
    assert 'src="http' not in page


@pytest.mark.parametrize(
    ("commit", "changed", "said"),
    [
        ("0123456789abcdef", [], "<code>0123456789ab</code>. The rows"),
        ("0123456789abcdef", [" M moa/x.py"], "<code>0123456789ab</code> and 1 changed file. The rows"),
        (None, [], "<code>snakemake --cores all</code>. The rows"),
    ],
)
def test_the_page_says_when_and_of_which_sources_it_is(
    results: Path, monkeypatch: pytest.MonkeyPatch, commit: str | None, changed: list[str], said: str
) -> None:
    monkeypatch.setattr(versions, "commit", lambda: commit)
    monkeypatch.setattr(versions, "changed", lambda: changed)
    report.run(results, json.dumps({"preset": "tiny"}), results / "report.html")
    page = (results / "report.html").read_text()
    assert re.search(r"<p>Written on \d{4}-\d\d-\d\d by", page)
    assert said in page


def test_sections_without_files_are_left_out(results: Path) -> None:
    report.run(results, json.dumps({"preset": "tiny"}), results / "report.html")
    assert "Two subjects" not in (results / "report.html").read_text()


def test_what_an_earlier_configuration_left_is_not_shown(results: Path) -> None:
    shown = [results / "tables/main.csv", results / "notebooks"]
    report.run(results, json.dumps({"preset": "tiny"}), results / "report.html", shown)
    page = (results / "report.html").read_text()
    assert '<td class="number">0.812</td>' in page
    assert "five" in page
    assert page.count("data:image/png;base64,") == 1  # the notebook's, not the figure


def columns(path: Path, text: str) -> dict[str, tuple[str, list[str]]]:
    """How a CSV file's columns are aligned, and their cells."""
    (path / "t.csv").write_text(text)
    shown = report.columns(report.read_table(path / "t.csv"))
    return {column.head: (column.aligned, list(column.cells)) for column in shown}


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["0.8000", "0.4523", "1.0000"], ["0.800", "0.452", "1.000"]),
        (["-0.0000", "-0.0123", ""], ["0.000", "−0.012", ""]),
        (["23.0420", "0.5000", "31.1"], ["23.04", "0.50", "31.10"]),
        (["1234.5678", "812.0000"], ["1,234.6", "812.0"]),
        (["12000", "5"], ["12,000", "5"]),
        (["0.1234", "not measured", "nan"], ["0.123", "not measured", "nan"]),
        (["0.5", "0.25", "2"], ["0.50", "0.25", "2.00"]),
        (["2.5e-05", "1.0"], ["0.000", "1.000"]),
    ],
)
def test_numbers_of_a_column_have_the_same_decimals(given: list[str], shown: list[str]) -> None:
    (column,) = report.columns([["x"], *([value] for value in given)])
    assert column.cells == shown
    assert column.aligned == "number"


def test_text_is_left_and_numbers_are_right(tmp_path: Path) -> None:
    made = columns(tmp_path, 'section,name,n\n2.2,<b>,3\n"2.2, 4.2",1,4\n')
    assert made == {
        "section": ("text", ["2.2", "2.2, 4.2"]),
        "name": ("text", ["&lt;b&gt;", "1"]),
        "n": ("number", ["3", "4"]),
    }


def test_limits_stand_behind_their_number(tmp_path: Path) -> None:
    made = columns(tmp_path, "ip,ip_low,ip_high,x_low\n0.5,,,1\n-0.0100,-0.1000,0.2345,4\n")
    assert made == {
        "ip": ("number", ["0.500", "−0.010"]),
        "[low, high]": ("limits", ["", "[−0.100, 0.234]"]),
        "x_low": ("number", ["1", "4"]),
    }


def test_long_tables_are_folded_away(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("n\n" + "1\n" * 30)
    assert "<details>" not in report.table_html(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("n\n" + "1\n" * 31)
    assert report.table_html(tmp_path / "t.csv").startswith("<details><summary>31 rows</summary>")


def test_claims_are_counted_in_the_heading(results: Path) -> None:
    verdicts = ["holds", "undecided", "holds", "not measured", "does not hold", "undecided"]
    text = "".join(f"c,{verdict}\n" for verdict in verdicts)
    (results / "tables/claims.csv").write_text(f"claim,verdict\n{text}")
    report.run(results, json.dumps({"preset": "tiny"}), results / "report.html")
    heading = "What the paper claims: 2 hold, 1 does not hold, 2 are undecided, 1 not measured</h2>"
    assert heading in (results / "report.html").read_text()


def test_pictures_of_a_training_are_explained_once(results: Path) -> None:
    for name in ("moa/step-000005", "moa/step-000010", "fastcomposer/step-000005"):
        (results / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(results / f"train/{name}.png")
    report.run(results, json.dumps({"preset": "tiny"}), results / "report.html")
    page = (results / "report.html").read_text()
    above = re.findall(r'<p class="caption">(.*?)</p>\s*<p class="file">(.*?)</p>', page)
    assert [name for _, name in above] == ["train/moa/step-000005.png"]
    assert "A row is a validation subject." in above[0][0]


CARD = """# Data card

| | |
|---|---|
| photos | 80 |

## Splits

| Splits | count |
|---|---|
| train `a` | 60 |
| <i> | 2 |

A note with *stress*, and <script>.
"""


def test_markdown_becomes_a_page(results: Path) -> None:
    (results / "data").mkdir()
    (results / "data/card.md").write_text(CARD)
    report.run(results, json.dumps({"preset": "tiny"}), results / "report.html")
    page = (results / "report.html").read_text()
    assert "<h3>Data card</h3>" in page and "<h4>Splits</h4>" in page
    assert '<td class="text">train <code>a</code></td><td class="number">60</td>' in page
    assert '<td class="text">&lt;i&gt;</td>' in page
    assert "A note with <em>stress</em>, and &lt;script&gt;." in page
    assert '<table><tr><td class="text">photos</td>' in page  # no empty head
    assert "|---" not in page


def test_a_notebook_table_with_a_note_is_a_table() -> None:
    text = "| layers | prior_weight |\n| --- | --- |\n| L | 0.543 [0.538, 0.547] |\n\nL, the layers.\n"
    html = report.notebook_html(
        {"cells": [{"cell_type": "code", "outputs": [{"data": {"text/markdown": [text]}}]}]}
    )
    assert '<th class="text">layers</th><th class="number">prior_weight</th>' in html
    assert '<td class="number">0.543 [0.538, 0.547]</td>' in html
    assert "<p>L, the layers.</p>" in html
    assert "|" not in html
