"""Figures show what they are given, and are the same bytes for the same input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from evaluation_fakes import COLORS, make_rows, people

from moa.data.errors import DataError
from moa.data.records import SUBJECT, encode_image, write_rows
from moa.evaluation import maps, samples, table, tables
from moa.figures import curves, grids, layout, router_maps
from moa.figures.layout import Column, grid

CELL = 32


@pytest.fixture
def results(tmp_path):
    """Photos of flat colours; an image of method number m is the subject's colour with m white rows."""
    photos = [
        {"id": p.id, "identity": p.id, "word": p.word, "sha256": "",
         "image": encode_image(Image.new("RGB", (8, 8), color))}
        for p, color in zip(people(), COLORS, strict=True)
    ]  # fmt: skip
    write_rows(tmp_path / "subjects.parquet", photos, SUBJECT)
    methods = ("prior", "moa", "fastcomposer")
    rows = [row for kind in ("single", "multi", "swap") for row in make_rows(kind, methods)]
    for row in rows:
        image = Image.new("RGB", (8, 8), COLORS[int(row["subjects"][0][1:])])
        image.paste("white", (0, 0, 8, methods.index(row["method"])))
        path = tmp_path / row["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    samples.write(tmp_path / "samples.parquet", rows)
    return tmp_path


def draw(figure, results, name="figure.png", **options) -> np.ndarray:
    figure(
        [results / "samples.parquet"],
        results / "subjects.parquet",
        results,
        results / name,
        cell=CELL,
        **options,
    )
    return np.asarray(Image.open(results / name))


def cells(picture: np.ndarray, rows: int) -> list[tuple[int, ...]]:
    """Colours at the foot of the cells in the last of `rows` rows, from left to right."""
    y = picture.shape[0] - layout.MARGIN - layout.GAP - 4
    line = [tuple(int(v) for v in pixel) for pixel in picture[y]]
    return [c for before, c in zip([None, *line], line, strict=False) if c != before and c != (255, 255, 255)]


@pytest.mark.parametrize("figure", [grids.benchmark, grids.pairs, grids.swap])
def test_grids_are_the_same_bytes_again(results, figure):
    draw(figure, results, "a.png")
    draw(figure, results, "b.png")
    assert (results / "a.png").read_bytes() == (results / "b.png").read_bytes()


def test_benchmark_grid_has_a_row_a_subject_and_a_column_a_method(results):
    picture = draw(grids.benchmark, results, rows=3, prompts=2)
    assert cells(picture, 3) == [(255, 255, 0) if c == "yellow" else (0, 255, 255) for c in ["cyan"]] * 7
    fewer = draw(grids.benchmark, results, rows=3, prompts=2, methods=("moa", "unknown"))
    assert len(cells(fewer, 3)) == 3


def test_swap_grid_changes_the_subject_along_a_row(results):
    found = cells(draw(grids.swap, results, columns=6, prompts=1), 2)
    wanted = [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]
    assert found[-6:] == wanted


def test_swap_shows_one_class_word_only():
    rows = [{"subject": f"s{n}", "words": ["man" if n < 2 else "woman"]} for n in range(5)]
    assert grids.same_word(rows) == ["s2", "s3", "s4"]


def test_pairs_show_both_photos(results):
    found = cells(draw(grids.pairs, results, rows=1, prompts=1), 1)
    assert found[:2] == [(255, 0, 0), (0, 128, 0)]


def test_prompts_are_shown_with_the_subject_marked():
    row = {"prompt": "a woman and a man wave", "spans": [[2, 7], [14, 17]]}
    assert grids._template(row) == "a (S1) and a (S2) wave"
    assert grids._template({"prompt": "a man waves", "spans": [[2, 5]]}) == "a (subject) waves"


def test_missing_samples_are_named(results):
    with pytest.raises(DataError, match="split validation, kind single"):
        draw(grids.benchmark, results, split="validation")


def test_image_that_was_not_made_leaves_a_grey_cell():
    picture = np.asarray(grid([Column("a", "", [Image.new("RGB", (4, 4), "red"), None])], 16))
    assert tuple(picture[-layout.MARGIN - layout.GAP - 8, picture.shape[1] // 2]) == (232, 232, 232)
    with pytest.raises(ValueError, match="no images"):
        grid([])


def test_long_titles_are_wrapped():
    font = layout._font(10)
    lines = layout.wrap("a man in a white blazer, surprised, in front of blue plaid", font, 90)
    assert len(lines) > 2
    assert all(font.getlength(line) <= 90 for line in lines)


def write_log(path: Path, router: float) -> Path:
    path.parent.mkdir(parents=True)
    rows = "".join(f"{s},1,{1 / s},{router},{-0.1 * s}\n" for s in (10, 20, 30))
    path.write_text(f"step,loss,loss_masked,loss_router,loss_object\n{rows}")
    return path


def test_plots_are_the_same_bytes_again(tmp_path):
    logs = [
        write_log(tmp_path / name / "log.csv", router) for name, router in (("moa", 0.2), ("fastcomposer", 0))
    ]
    table.save(tables.quality(make_rows()), tmp_path / "main.csv")
    saved = maps.SavedMaps(
        np.zeros((1, 8, 8, 3), np.uint8), np.ones((1, 8, 8), bool), [9, 1],
        {"mid_block.attentions.0.transformer_blocks.0.attn2": np.full((1, 2, 4, 4), 0.5, np.float32)},
        [{"subject": "s0", "prompt": "a man"}],
    )  # fmt: skip
    maps.save_maps(tmp_path / "maps.safetensors", saved)
    for run in "ab":
        curves.training(logs, tmp_path / f"training-{run}.png")
        curves.scores(tmp_path / "main.csv", tmp_path / f"scores-{run}.png")
        router_maps.router_maps(tmp_path / "maps.safetensors", tmp_path / f"router-{run}.png")
    for name in ("training", "scores", "router"):
        first, second = ((tmp_path / f"{name}-{run}.png").read_bytes() for run in "ab")
        assert first == second
        assert b"Software" not in first


def test_one_subject_draws_bars_without_intervals(tmp_path):
    table.save(tables.quality([r for r in make_rows() if r["subject"] == "s0"]), tmp_path / "main.csv")
    curves.scores(tmp_path / "main.csv", tmp_path / "scores.png")
    assert Image.open(tmp_path / "scores.png").width > 100


@pytest.mark.parametrize("text", ["", "step,other\n1,2\n", "step,loss\n1,broken\n", "step,loss\n1\n"])
def test_broken_logs_are_named(tmp_path, text):
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=r"log\.csv"):
        curves.training([path], tmp_path / "out.png")


def test_layers_have_short_names():
    assert router_maps.short("down_blocks.1.attentions.0.transformer_blocks.0.attn1") == "down 1.0.0 self"
    assert router_maps.short("mid_block.attentions.0.transformer_blocks.0.attn2") == "mid 0.0 cross"
    assert router_maps.pick(3, 10) == [0, 4, 9]
    assert router_maps.pick(5, 2) == [0, 1]


def test_notebook_can_run_headless_and_is_shipped_without_outputs():
    notebook = json.loads(Path("notebooks/router_maps.ipynb").read_text())
    assert notebook["metadata"]["language_info"]["name"] == "python"
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
