"""The score stage from files to files, with judges whose answers are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_fakes import COLORS, ColorJudges, make_rows
from PIL import Image

from moa.data.errors import DataError
from moa.data.records import read_rows
from moa.evaluation import features, references, samples, score, swaps
from moa.evaluation.identity import DetectorConfig, EmbedderConfig
from moa.evaluation.judges import Judges, ScoreConfig
from moa.evaluation.samples import KEPT, MADE
from moa.methods import ModelSource


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Images: of each subject its own colour on the left; of pairs both colours; s3 is left out (black)."""
    for module in (references, score):
        monkeypatch.setattr(module, "Judges", ColorJudges)
    rows = [row for kind in ("single", "multi", "swap") for row in make_rows(kind, ("moa",))]
    for row in rows:
        colors = [COLORS[int(name[1:])] if name != "s3" else "black" for name in row["subjects"]]
        image = Image.new("RGB", (16, 16), colors[0])
        if len(colors) == 2:
            image.paste(colors[1], (8, 0, 16, 16))
        elif row["kind"] == "swap":
            image.paste("white", (0, 8, 16, 16))
        path = tmp_path / row["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    samples.write(tmp_path / "made.parquet", [{k: r[k] for k in MADE.names} for r in rows], MADE)
    return tmp_path


def run(results, subjects_file):
    config = ScoreConfig(ModelSource("clip"), ModelSource("segmenter"))
    references.look(config, subjects_file, results / "references.parquet")
    score.score(
        config,
        [results / "made.parquet"],
        subjects_file,
        results / "references.parquet",
        results,
        results / "samples.parquet",
        results / "features.parquet",
    )
    return samples.read(results / "samples.parquet")


def test_scores_follow_the_images(results, subjects_file):
    scored = {(r["kind"], r["subject"], r["prompt_id"]): r for r in run(results, subjects_file)}
    right, empty = scored["single", "s0", "group-00"], scored["single", "s3", "group-00"]
    assert (right["ip"], right["found"], right["pc"]) == (pytest.approx(1), True, pytest.approx(0.6))
    assert (empty["ip"], empty["found"], empty["faces"], empty["face_size"]) == (0, False, 0, 0)
    pair, half = scored["multi", "s0+s1", "group-00"], scored["multi", "s2+s3", "group-00"]
    assert (pair["ip"], pair["faces"], pair["face_size"]) == (pytest.approx(1), 2, pytest.approx(0.5))
    assert (half["ip"], half["found"]) == (0, False)


def test_members_are_the_subjects_and_whom_the_method_was_shown(results, subjects_file):
    made = samples.read(results / "made.parquet", MADE)
    wrong = [row | {"method": "moa_wrong_subject"} for row in made if row["kind"] != "swap"]
    samples.write(results / "made.parquet", [*made, *wrong], MADE)
    rows = {(r["method"], r["kind"], r["subject"]): r["members"] for r in run(results, subjects_file)}
    assert rows["moa", "single", "s0"] == ["s0"]
    assert rows["moa_wrong_subject", "single", "s0"] == ["s0", "s2"]  # the next of the same word
    assert rows["moa_wrong_subject", "single", "s5"] == ["s5", "s1"]
    assert rows["moa", "multi", "s0+s1"] == ["s0", "s1"]
    assert rows["moa_wrong_subject", "multi", "s0+s1"] == ["s0", "s1", "s2", "s3"]


def test_scoring_again_gives_the_same_bytes(results, subjects_file):
    run(results, subjects_file)
    before = [(results / name).read_bytes() for name in ("samples.parquet", "features.parquet")]
    run(results, subjects_file)
    assert before == [(results / name).read_bytes() for name in ("samples.parquet", "features.parquet")]


def test_features_survive_the_file(results, subjects_file):
    run(results, subjects_file)
    seen = features.read(results / "features.parquet")
    image = samples.open_image(results / next(iter(seen)))[0]
    again = ColorJudges(None).look([image])[0]
    first = next(iter(seen.values()))
    np.testing.assert_allclose(first.identity, again.identity)
    np.testing.assert_array_equal(first.persons, again.persons)
    assert len(first.sha256) == 64


def test_swaps_are_compared_outside_the_subjects(results, subjects_file):
    run(results, subjects_file)
    swaps.compare_swaps(
        [results / "samples.parquet"], [results / "features.parquet"], results, results / "kept.parquet"
    )
    kept = read_rows(results / "kept.parquet", KEPT)
    assert len(kept) == 2 * 15
    row = next(r for r in kept if (r["subject"], r["other"]) == ("s0", "s2"))
    assert row["members"] == ["s0", "s2"]
    assert row["outside"] == pytest.approx(11 / 16)  # four columns of persons and one of dilation
    # red against blue above, white below: the error is 2/3 of 255² in half of the pixels
    assert row["psnr"] == pytest.approx(-10 * np.log10(1 / 3), abs=1e-6)


def test_swaps_with_an_image_of_nobody_have_no_value(results, subjects_file):
    run(results, subjects_file)
    swaps.compare_swaps(
        [results / "samples.parquet"], [results / "features.parquet"], results, results / "kept.parquet"
    )
    kept = read_rows(results / "kept.parquet", KEPT)
    unseen = [row for row in kept if "s3" in row["members"]]
    assert len(unseen) == 2 * 5
    assert all(row["psnr"] is row["ssim"] is None for row in unseen)
    assert all(row["psnr"] is not None for row in kept if row not in unseen)


def test_faceless_reference_is_named(results, subjects_file, monkeypatch):
    blind = type(
        "Blind",
        (ColorJudges,),
        {"look": lambda self, images: [self._look(np.zeros((8, 8, 3))) for _ in images]},
    )
    monkeypatch.setattr(references, "Judges", blind)
    with pytest.raises(DataError, match="no face found in the photo of subject s0, s1"):
        run(results, subjects_file)


def test_broken_image_is_named(results, subjects_file):
    next(results.glob("images/moa/test/single/*.png")).write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="is no readable image"):
        run(results, subjects_file)


def test_merge_refuses_doubles(results, subjects_file):
    run(results, subjects_file)
    samples.merge([results / "samples.parquet"], results / "all.parquet")
    assert (results / "all.parquet").read_bytes() == (results / "samples.parquet").read_bytes()
    with pytest.raises(DataError, match="two rows"):
        samples.merge([results / "samples.parquet"] * 2, results / "all.parquet")


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """The real judges with untrained weights; any query of the segmenter may be a person."""
    from moa.miniature import models

    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(1)
    segmenter = models.segmenter()
    with torch.no_grad():
        segmenter.class_predictor.bias += torch.tensor([0.0, 9.0, 0.0])  # background, person, nothing
    for name, model, processor in (
        ("segmenter", segmenter, models.segmenter_processor()),
        ("clip", models.clip(1), models.clip_processor()),
        ("identity", models.embedder(), models.judge_processor()),
    ):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    segmenter_id = str(folder / "segmenter")
    made = Judges(
        ScoreConfig(
            clip_judge=ModelSource(str(folder / "clip")),
            segmenter=ModelSource(segmenter_id),
            segmenter_threshold=0.0,
            identity=EmbedderConfig("auto", str(folder / "identity")),
            detector=DetectorConfig("segmenter", segmenter_id, threshold=0.0),
            batch_size=3,
        )
    )
    found = made.persons.segmenter
    found.config = replace(found.config, overlap=0.0)  # untrained masks overlap
    return made


def test_batches_give_what_single_images_give(judges):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (s, s, 3), dtype=np.uint8)) for s in (64, 64, 48, 64)]
    together = judges.look(images)
    assert any(len(found.detection.boxes) for found in together)
    for image, found in zip(images, together, strict=True):
        alone = judges.look([image])[0]
        np.testing.assert_allclose(found.clip, alone.clip, atol=1e-5)
        np.testing.assert_allclose(found.identity, alone.identity, atol=1e-5)
        np.testing.assert_array_equal(found.persons, alone.persons)
        assert found.identity.shape[0] == found.color.shape[0] == len(found.detection.boxes)


def test_segmenter_that_is_the_detector_runs_once(judges):
    assert judges.detector is None
