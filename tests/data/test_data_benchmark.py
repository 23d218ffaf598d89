"""The benchmark of captions and masks compares equal work, and says what it measured."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Blip2ForConditionalGeneration, Mask2FormerForUniversalSegmentation

from moa import stages as stage_table
from moa.data import benchmark
from moa.data.benchmark import (
    COLUMNS,
    Cost,
    DataBenchmarkConfig,
    loop,
    random_blip2,
    random_mask2former,
    stages,
)
from moa.data.caption import Captioner, mend
from moa.data.records import RAW, decode_image, read_rows
from moa.data.segment import Segmenter
from moa.hashing import ROOT
from moa.methods import ModelSource

TINY_BLIP2 = {
    "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 28},
    "qformer_config": {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2},
    "text_config": {"hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2, "word_embed_proj_dim": 16},
}
TINY_MASK2FORMER = {
    "swin": {"embed_dim": 8, "num_heads": (1, 1, 2, 2), "window_size": 2},
    "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16,
    "num_attention_heads": 2, "dim_feedforward": 16, "num_queries": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def small(captioner, tmp_path_factory) -> tuple[ModelSource, ModelSource, list[str]]:
    """Both models of the true kind, made tiny, and what they are said to be."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    names = [
        random_blip2(folder / "captioner", captioner, False, **TINY_BLIP2),
        random_mask2former(folder / "segmenter", 64, False, **TINY_MASK2FORMER),
    ]
    return ModelSource(str(folder / "captioner")), ModelSource(str(folder / "segmenter")), names


def test_loop_and_stages_say_the_same(captioner, small, rendered):
    captioning, segmenting = DataBenchmarkConfig().annotators(captioner, small[1], 4)
    models = Captioner(captioning), Segmenter(segmenting)
    rows = read_rows(rendered.raw, RAW)[:6]
    one, other = loop(*models, rows), stages(*models, rows)
    assert [mend(text) for text in one] == other
    assert len(set(one)) > 1


def test_the_layers_that_are_left_are_said_and_are_there(small):
    assert small[2] == [
        "BLIP-2 OPT-2.7B (vision 2 of 39, qformer 2 of 12, text 2 of 32 layers)",
        "Mask2Former Swin-L (Swin 8 of 24, encoder 3 of 6, decoder 3 of 10 layers)",
    ]
    speaker = Blip2ForConditionalGeneration.from_pretrained(small[0].id)
    assert len(speaker.language_model.model.decoder.layers) == len(speaker.vision_model.encoder.layers) == 2
    finder = Mask2FormerForUniversalSegmentation.from_pretrained(small[1].id)
    assert finder.config.decoder_layers == 3 and list(finder.config.backbone_config.depths) == [2, 2, 2, 2]


def test_true_sizes_are_those_of_the_published_models(captioner, monkeypatch, tmp_path):
    """Counted without weights: BLIP-2 with OPT-2.7B has 3.7 billion parameters, Mask2Former 216 million."""
    counted = {}

    def count(model, folder):
        counted[Path(folder).name] = sum(p.numel() for p in model.parameters())

    for kind in (Blip2ForConditionalGeneration, Mask2FormerForUniversalSegmentation):
        monkeypatch.setattr(kind, "save_pretrained", count)
    with torch.device("meta"):
        random_blip2(tmp_path / "blip2", captioner, True)
        random_mask2former(tmp_path / "mask2former", 384, True)
    assert counted["blip2"] == pytest.approx(3.74e9, rel=0.02)
    assert counted["mask2former"] == pytest.approx(216e6, rel=0.02)


def test_a_straight_line_is_found_and_what_is_off_it_said():
    counts = [500, 1000, 2000, 5000]
    fits = benchmark.straight(counts, [3 + 0.01 * n for n in counts])
    np.testing.assert_allclose(fits, [(3 + 0.01 * n, 0) for n in counts], atol=1e-9)
    bent = benchmark.straight(counts, [n**2 / 1e5 for n in counts])
    assert max(residual for _, residual in bent) > 0.3


def test_a_run_has_a_row_for_everything(captioner, small, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "alone", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(
        benchmark, "random_blip2",
        lambda folder, *rest: random_blip2(folder, *rest, **TINY_BLIP2),
    )  # fmt: skip
    monkeypatch.setattr(
        benchmark, "random_mask2former",
        lambda folder, *rest: random_mask2former(folder, *rest, **TINY_MASK2FORMER),
    )  # fmt: skip
    config = DataBenchmarkConfig(
        captioner, small[1], photos=3, batch_size=2, repeats=1, counts=(2, 4, 6), shard=2, true_photos=3,
        true_batch=2, true_side=64,
    )  # fmt: skip
    benchmark.run(config, tmp_path / "data.csv")
    with (tmp_path / "data.csv").open() as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert [(row["kind"], row["variant"], row["photos"]) for row in table] == [
        ("miniature", "loop", "3"), ("miniature", "stages", "3"),
        ("mixed sizes", "loop", "3"), ("mixed sizes", "stages", "3"),
        ("true widths", "loop", "3"), ("true widths", "stages", "3"),
        ("scale", "stages", "2"), ("scale", "stages", "4"), ("scale", "stages", "6"),
    ]  # fmt: skip
    for row in table:
        rate = float(row["photos"]) / float(row["seconds"])
        assert float(row["images_per_second"]) == pytest.approx(rate, rel=1e-3)
    for base, other in (table[:2], table[2:4], table[4:6]):
        assert float(base["ratio"]) == float(base["cpu_ratio"]) == 1
        quotient = float(base["seconds"]) / float(other["seconds"])
        assert float(other["ratio"]) == pytest.approx(quotient, rel=1e-2)
    for row in table[6:]:
        off = abs(float(row["cpu_seconds"]) / float(row["fit_cpu_seconds"]) - 1)
        assert float(row["residual"]) == pytest.approx(off, abs=2e-3)
        assert int(row["peak_mb"]) > 100
        off = abs(float(row["peak_mb"]) / float(row["fit_peak_mb"]) - 1)
        assert float(row["peak_residual"]) == pytest.approx(off, abs=2e-3)
        grown = float(row["peak_mb"]) / float(table[6]["peak_mb"])
        assert float(row["peak_growth"]) == pytest.approx(grown, abs=2e-3)


def test_more_photos_are_looked_at_shard_by_shard(monkeypatch, tmp_path):
    asked = []

    def annotate_shards(settings, raws, folder):
        asked.append([raw.name for raw in raws])
        return Cost(1.0, len(raws), 1)

    monkeypatch.setattr(benchmark, "annotate_shards", annotate_shards)
    monkeypatch.setattr(benchmark, "alone", lambda function, *arguments: function(*arguments))
    config = DataBenchmarkConfig(counts=(4, 8), shard=2)
    raws = [benchmark.draw_shard(tmp_path, n, 2, 8) for n in range(4)]
    benchmark.scale(config, (None, None), raws, tmp_path)
    assert asked == [["raw-0.parquet", "raw-1.parquet"], [f"raw-{n}.parquet" for n in range(4)]]
    ids = [row["id"] for raw in raws for row in read_rows(raw, RAW)]
    assert len(set(ids)) == 8


def test_photos_are_resized_as_asked(rendered, tmp_path):
    sizes = [(96, 96), *benchmark.mixed(5)]
    rows = read_rows(benchmark.resized(rendered.raw, sizes, tmp_path / "other.parquet"), RAW)
    assert [decode_image(row["image"]).size for row in rows] == sizes
    assert [(row["width"], row["height"]) for row in rows] == sizes
    assert np.ptp(np.asarray(decode_image(rows[0]["image"]))) > 0
    assert len(set(benchmark.mixed(1000))) == 1000


def test_the_models_that_are_measured_are_inputs_of_the_rule(monkeypatch):
    """Other weights cost differently; the workflow knows the defaults without importing PyTorch."""
    monkeypatch.chdir(ROOT)
    known = DataBenchmarkConfig()
    found = stage_table.benchmark_files({"data": {"benchmark": {}}})
    assert {str(Path(file).parent) for file in found} == {known.captioner.id, known.segmenter.id}
    other = {"data": {"benchmark": {"captioner": {"id": "moa/miniature/weights/identity"}}}}
    folders = {str(Path(file).parent) for file in stage_table.benchmark_files(other)}
    assert folders == {"moa/miniature/weights/identity", known.segmenter.id}


@pytest.mark.parametrize(
    "wrong",
    [{"counts": (500, 700)}, {"counts": (500,)}, {"true_side": 100}, {"true_photos": -1}, {"repeats": 0}],
)
def test_settings_that_cannot_be_measured_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        DataBenchmarkConfig(**wrong)


def test_a_configuration_may_leave_the_benchmark_out():
    """As config/paper.yaml may, whose rules are read whatever is asked for."""
    from moa import stages

    files = stages.benchmark_files({"data": {}})
    assert any("captioner" in file for file in files) and any("segmenter" in file for file in files)
