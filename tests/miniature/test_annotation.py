"""The measure of the annotators must be 1 for faultless ones and fall for each fault by what it costs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from moa.data import align
from moa.data.align import AlignConfig
from moa.data.errors import DataError, Rejected
from moa.data.records import CAPTION, RECORD, SEGMENT, TRUTH, encode_mask, read_rows, write_rows
from moa.methods import ModelSource
from moa.miniature import annotation, dataset
from moa.miniature.annotation import annotation_errors, read_facts, whom
from moa.miniature.captions import Wording, task_caption
from moa.miniature.dataset import RenderConfig, draw_scene
from moa.miniature.render import render
from moa.miniature.tokenizer import load_tokenizer
from moa.miniature.world import identities, sample_scene

FULL = Wording(context=1.0, generic=0.0, prefix=0.0)


def test_reading_a_task_caption_is_the_inverse_of_writing_it():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng, identities("train"), 1 + seed % 2, prop=seed % 3 == 0)
        caption = task_caption(scene, rng)
        figures, background = read_facts(caption.text)
        assert figures == caption.facts["figures"], caption.text
        assert background == caption.facts["scene"], caption.text


def test_odd_captions_state_what_can_be_read():
    assert read_facts("") == ([], {})
    assert read_facts("a man a man hills blue") == ([{"class": "man"}, {"class": "man"}], {})


def test_statements_are_laid_to_the_likeliest_figure():
    true = [{"class": "man", "clothes_color": "red"}, {"class": "man", "clothes_color": "blue"}]
    assert whom([{"clothes_color": "blue"}, {"clothes_color": "red"}], true) == (1, 0)
    assert whom([{"class": "man"}, {"class": "man"}], true) == (0, 1)


@pytest.fixture(scope="module")
def faultless():
    """Truth, captions, segments and records of 12 photos, as faultless annotators would make them."""
    config = RenderConfig(pairs=0.5, props=0.3)
    truth, captions, segments, records = [], [], [], []
    for index in range(12):
        scene, _ = draw_scene(config, "train", index)
        caption, mask = (
            task_caption(scene, np.random.default_rng(index), FULL),
            encode_mask(render(scene).mask),
        )
        name, ids = str(index), range(1, len(scene.identities) + 1)
        truth.append({"id": name, "scene": json.dumps(scene.to_dict()), "mask": mask})
        captions.append({"id": name, "caption": caption.text})
        segments.append({"id": name, "mask": mask, "segments": [{"segment_id": k} for k in ids]})
        named = [{"segment_id": k} for k in ids]
        records.append({"id": name, "caption": caption.text, "mask": mask, "segments": named})
    return truth, captions, segments, records


def values(*tables) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in annotation_errors(*tables)}


def test_faultless_annotators_score_one_everywhere(faultless):
    found = values(*faultless)
    assert set(found.values()) == {1.0}
    assert {"mask.iou", "alignment.right", "alignment.pairs.right", "caption.expression.right"} <= set(found)


def test_exchanged_segments_are_wrong_alignments_only(faultless):
    truth, captions, segments, records = faultless
    crossed = [r | {"segments": r["segments"][::-1]} for r in records]
    found = values(truth, captions, segments, crossed)
    assert found["alignment.pairs.right"] == 0.0
    assert 0 < found["alignment.right"] < 1
    assert found["mask.iou"] == found["caption.all.right"] == 1.0


def test_a_wrong_word_costs_its_own_attribute(faultless):
    truth, captions, segments, records = faultless
    colors = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
    text = captions[0]["caption"]
    said = read_facts(text)[0][0]["clothes_color"]
    other = next(c for c in colors if c != said)
    wrong = [{"id": "0", "caption": text.replace(f" {said} ", f" {other} ", 1)}, *captions[1:]]
    found = values(truth, wrong, segments, records)
    assert found["caption.clothes_color.right"] < 1
    assert found["caption.clothes.right"] == found["caption.expression.right"] == 1.0


def test_missed_people_count_as_no_overlap(faultless):
    truth, captions, segments, _records = faultless
    missed = [s | {"mask": None, "segments": []} for s in segments]
    found = values(truth, captions, missed, [])
    assert found["mask.iou"] == found["mask.found"] == found["records.kept"] == 0.0
    assert "alignment.right" not in found


def test_overlap_is_intersection_over_union():
    true, found = np.zeros((4, 4), int), np.zeros((4, 4), int)
    true[:2], found[1:3] = 1, 1
    assert annotation.overlaps(found, true, 1).tolist() == [[pytest.approx(1 / 3)]]


def test_shards_of_other_photos_are_refused(faultless):
    truth, captions, segments, records = faultless
    with pytest.raises(DataError, match="about other photos"):
        annotation_errors(truth, captions[::-1], segments, records)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> dict[str, Path]:
    """24 validation photos, half of them pairs, with true captions and a segmenter that sees nobody."""
    folder = tmp_path_factory.mktemp("drawn")
    kinds = ("raw", "truth", "captions", "segments", "records", "train")
    paths = {kind: folder / f"{kind}.parquet" for kind in kinds}
    settings = RenderConfig(train=24, validation=24, shard_size=24, pairs=0.5)
    dataset.run(settings, "train", 0, folder / "other.parquet", paths["train"])
    dataset.run(settings, "validation", 0, paths["raw"], paths["truth"])
    truth = read_rows(paths["truth"], TRUTH)
    common = {"problem": None, "model": "m", "revision": "r", "settings": "{}"}
    write_rows(
        paths["captions"], [{"id": t["id"], "caption": t["caption"], **common} for t in truth], CAPTION
    )
    blind = [{"id": t["id"], "mask": None, "segments": [], **common} for t in truth]
    write_rows(paths["segments"], blind, SEGMENT)
    write_rows(paths["records"], [], RECORD)
    load_tokenizer().save_pretrained(folder / "tokenizer")
    return paths


def table(paths: dict[str, Path], **changes: Path) -> dict[str, tuple[float, int]]:
    """Value and count of each metric in the CSV of the stage."""
    config = AlignConfig(
        ModelSource(str(paths["raw"].parent / "tokenizer")), "", phrases="lexicon", min_area=0.0
    )
    output = paths["raw"].parent / "errors.csv"
    annotation.run(config, **{kind: [path] for kind, path in (paths | changes).items()}, output=output)
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["metric", "value", "count"]
    assert [row["metric"] for row in rows] == sorted({row["metric"] for row in rows})
    return {row["metric"]: (float(row["value"]), int(row["count"])) for row in rows}


def test_alignment_is_measured_on_true_masks_whatever_the_segmenter_says(drawn):
    found = table(drawn)
    assert found["mask.iou"][0] == found["records.kept"][0] == 0
    figures = found["mask.iou"][1]
    assert found["alignment.true_masks"] == (1.0, figures) and figures > 30
    assert found["alignment.pairs.true_masks"] == (1.0, 2 * (figures - 24))
    assert found["records.true_masks"] == (1.0, 24)


def test_alignment_on_true_masks_is_that_of_the_stage(drawn, monkeypatch):
    """Were the matcher to exchange people, the figure would say so; that of rejected photos, too."""
    monkeypatch.setattr(align, "match", lambda photo, caption, people, segments, *_: segments[::-1])
    assert table(drawn)["alignment.pairs.true_masks"][0] == 0
    monkeypatch.setattr(align, "check_visible", reject)
    found = table(drawn)
    assert found["records.true_masks"] == (0.0, 24) and "alignment.true_masks" not in found


def reject(*_) -> None:
    raise Rejected("outside", "")


def test_photos_and_people_of_both_splits_are_counted(drawn):
    found = table(drawn)
    assert found["splits.photos.in_both"] == (0, 48)
    assert found["splits.identities.in_both"][0] == 0 and found["splits.identities.in_both"][1] > 48
    leaked = table(drawn, train=drawn["truth"])
    assert leaked["splits.photos.in_both"] == (24, 24)
    shared, people = leaked["splits.identities.in_both"]
    assert shared == people > 24


def test_photos_of_another_shard_are_refused(drawn):
    with pytest.raises(DataError, match="raw and truth are about other photos"):
        table(drawn, raw=drawn["raw"].parent / "other.parquet")


def test_a_record_about_other_people_is_aligned_wrongly(faultless):
    """A caption that names one person of two binds that word to whichever segment it was given."""
    truth, captions, segments, records = faultless
    pair = next(r for r in records if len(r["segments"]) == 2)
    short = pair | {"caption": "a man", "segments": pair["segments"][:1]}
    rows = {row["metric"]: row for row in annotation_errors(truth, captions, segments, [short])}
    assert (rows["alignment.right"]["value"], rows["alignment.right"]["count"]) == (0.0, 1)
