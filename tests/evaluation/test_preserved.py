"""What is left of the prior's images, on images whose likeness is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from evaluation_fakes import make_rows
from PIL import Image
from test_measures import look

from moa.data.errors import DataError
from moa.data.records import read_rows
from moa.evaluation import context, features, preserved, samples
from moa.evaluation.preserved import PRESERVED


@pytest.fixture
def results(tmp_path):
    """The prior's images are noise of their seed; MoA repeats them with a white subject on the left."""
    rows = make_rows("single", ("prior", "moa"))
    seen: dict = {"prior": {}, "moa": {}}
    for row in rows:
        pixels = np.random.default_rng(row["seed"]).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        if row["method"] == "moa":
            pixels[:, :12] = 255
        (tmp_path / row["path"]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / row["path"])
        persons = np.zeros((32, 32), dtype=bool)
        persons[:, : 12 if row["method"] == "moa" else 8] = True
        seen[row["method"]][row["path"]] = replace(look(), mask=features.encode_persons(persons))
    for method, own in seen.items():
        features.write(tmp_path / f"{method}-features.parquet", own)
        samples.write(tmp_path / f"{method}.parquet", [row for row in rows if row["method"] == method])
    return tmp_path


def compare(results, method="moa"):
    preserved.compare(
        results / f"{method}.parquet", results / f"{method}-features.parquet",
        results / "prior.parquet", results / "prior-features.parquet", results, results / "out.parquet",
    )  # fmt: skip
    return read_rows(results / "out.parquet", PRESERVED)


def test_context_is_compared_beside_the_persons_and_with_the_same_noise(results):
    rows = compare(results)
    assert len(rows) == 12
    assert {round(row["psnr"], 2) for row in rows} == {58.92}  # equal up to rounding
    assert {row["layout"] for row in rows} == {8 / 12}
    assert all(row["noise_subjects"] == [f"s{(int(row['subject'][1]) + 1) % 6}"] for row in rows)
    assert max(row["noise_psnr"] for row in rows) < 10
    assert max(row["noise_ssim"] for row in rows) < 0.2
    assert {row["noise_layout"] for row in rows} == {8 / 12}


def test_the_priors_images_may_lie_in_another_folder(results, tmp_path):
    """As those of an ablation's prior do."""
    expected, elsewhere = compare(results), tmp_path / "elsewhere"
    (elsewhere / "images").mkdir(parents=True)
    (results / "images/prior").rename(elsewhere / "images/prior")
    preserved.compare(
        results / "moa.parquet", results / "moa-features.parquet", results / "prior.parquet",
        results / "prior-features.parquet", results, results / "out.parquet", prior_results=elsewhere,
    )  # fmt: skip
    assert read_rows(results / "out.parquet", PRESERVED) == expected


def test_values_are_those_of_the_swaps_comparison(results):
    row = compare(results)[0]
    mine, noise = (
        np.asarray(Image.open(results / f"images/{method}/test/single/{name}.0.png"))
        for method, name in (("moa", "s0"), ("prior", "s1"))
    )
    mask = np.zeros((32, 32), dtype=bool)
    mask[:, :12] = True
    expected = context.kept(mine, noise, context.dilate(mask, 0.05))
    assert (row["subject"], row["prompt_id"]) == ("s0", "group-00")
    assert (row["noise_psnr"], row["noise_ssim"]) == (expected.psnr, expected.ssim)


def test_the_prior_itself_is_the_ceiling(results):
    assert {row["layout"] for row in compare(results, "prior")} == {1.0}


def test_other_noise_is_of_the_same_prompt_and_goes_round():
    rows = make_rows("single", ("prior",))
    other = preserved.other_noise(rows)
    for row in rows:
        found = other[preserved.request_of(row)]
        assert found["prompt"] == row["prompt"]
        assert found["subject"] == f"s{(int(row['subject'][1]) + 1) % 6}"
    assert preserved.other_noise(make_rows("swap", ("prior",))) == {}  # all subjects share the noise


def test_nobody_found_is_no_value(results):
    seen = features.read(results / "moa-features.parquet")
    empty = features.encode_persons(np.zeros((32, 32), dtype=bool))
    nobody = {path: replace(f, mask=empty) for path, f in seen.items()}
    features.write(results / "moa-features.parquet", nobody)
    rows = compare(results)
    assert {row[name] for row in rows for name in PRESERVED.names[9:15]} == {None}


def test_other_noise_than_the_priors_is_an_error(results):
    rows = samples.read(results / "moa.parquet")
    samples.write(results / "moa.parquet", [{**row, "seed": 7} for row in rows])
    with pytest.raises(DataError, match="12 images and the prior's have different seeds"):
        compare(results)


def test_requests_that_the_prior_has_not_are_left_out(results):
    rows = samples.read(results / "prior.parquet")
    samples.write(results / "prior.parquet", [row for row in rows if row["subject"] == "s2"])
    assert {row["subject"] for row in compare(results)} == {"s2"}
