"""The report shows what there is, whole and readable, and escapes what it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from moa import report


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
    assert "<td>0.8123</td>" in page
    assert "<td>150</td>" in page
    assert page.count("data:image/png;base64,") == 2
    assert "<h3>Router</h3><p>A &lt; B</p>" in page
    assert "five" in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert "<td>&gt; 0</td><td>does not hold</td>" in page
    assert 'src="http' not in page


def test_sections_without_files_are_left_out(results: Path) -> None:
    report.run(results, json.dumps({"preset": "tiny"}), results / "report.html")
    assert "Two subjects" not in (results / "report.html").read_text()


def test_what_an_earlier_configuration_left_is_not_shown(results: Path) -> None:
    shown = [results / "tables/main.csv", results / "notebooks"]
    report.run(results, json.dumps({"preset": "tiny"}), results / "report.html", shown)
    page = (results / "report.html").read_text()
    assert "<td>0.8123</td>" in page
    assert "five" in page
    assert page.count("data:image/png;base64,") == 1  # the notebook's, not the figure


@pytest.mark.parametrize(
    ("text", "shown"),
    [("12000", "12,000"), ("0.5", "0.5"), ("3.14159", "3.14"), ("", ""), ("nan", "nan"), ("a", "a")],
)
def test_cells(text: str, shown: str) -> None:
    assert report.cell(text) == shown


def test_intervals_are_folded_and_text_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "section,n,ip,ip_low,ip_high,x_low\n2.2,1200,0.5,,,\n3,7,-0.0000,-0.1000,1234.5678,4\n"
    )
    html = report.table_html(tmp_path / "t.csv")
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", html)
    assert cells == [
        "section",
        "n",
        "ip",
        "x_low",
        "2.2",
        "1,200",
        "0.5",
        "",
        "3",
        "7",
        "0 [-0.1, 1,234.57]",
        "4",
    ]
    assert "<details>" not in html
    (tmp_path / "t.csv").write_text("n\n" + "1\n" * 41)
    assert report.table_html(tmp_path / "t.csv").startswith("<details><summary>41 rows</summary>")


def test_printed_markdown_tables_become_tables() -> None:
    html = report.printed_html("| a | `b` |\n|---|---|\n| 1 | *<2>* |")
    assert re.findall(r"<t[hd]>(.*?)</t[hd]>", html) == ["a", "b", "1", "&lt;2&gt;"]
    assert report.printed_html("| not\na table") == "<pre>| not\na table</pre>"
