"""Two methods are compared over the same pixels, and both or neither."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from evaluation_fakes import make_rows
from PIL import Image
from test_measures import look

from moa.data.records import read_rows
from moa.evaluation import context, features, samples, shared
from moa.evaluation.measures import MEASURE

WIDTHS = {"prior": 8, "moa": 8, "fastcomposer": 20}  # of the people, from the left


@pytest.fixture
def results(tmp_path):
    """Noise of their seed; both methods change columns 12 to 20, which FastComposer's people hide."""
    rows = [row for kind in ("single", "swap") for row in make_rows(kind, tuple(WIDTHS))]
    for row in rows:
        pixels = np.random.default_rng(row["seed"]).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        if row["method"] != "prior":
            pixels[:, 12:20] += int(row["subject"][1])
        (tmp_path / row["path"]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / row["path"])
    for method, width in WIDTHS.items():
        own = [row for row in rows if row["method"] == method]
        persons = np.zeros((32, 32), dtype=bool)
        persons[:, :width] = True
        features.write(
            tmp_path / f"{method}-features.parquet",
            {row["path"]: replace(look(), mask=features.encode_persons(persons)) for row in own},
        )
        samples.write(tmp_path / f"{method}.parquet", own)
    return tmp_path


def compare(results, prior=("prior",)):
    def files(names):
        ends = ("", "-features")
        return [[results / f"{name}{end}.parquet" for name in names] for end in ends]

    made, prior_made = files(("moa", "fastcomposer")), files(prior)
    shared.compare(*made, results, results / "out.parquet", *prior_made)
    return read_rows(results / "out.parquet", MEASURE)


def of(rows, metric, method, kind="swap"):
    found = {(row["metric"], row["method"], row["kind"]): {} for row in rows}
    for row in rows:
        found[row["metric"], row["method"], row["kind"]][row["unit"]] = row["value"]
    return found.get((metric, method, kind), {})


def test_pixels_that_one_methods_people_hide_count_for_neither(results):
    rows = compare(results)
    for metric, kind, count in (
        ("swap_psnr", "swap", 30),
        ("prior_psnr", "swap", 12),
        ("prior_psnr", "single", 12),
    ):
        moa, other = (of(rows, f"{metric}_shared", method, kind) for method in ("moa", "fastcomposer"))
        assert moa == other
        assert len(moa) == count
        assert {round(value, 2) for value in moa.values()} == {58.92}  # equal up to rounding
    members = {row["unit"]: row["members"] for row in rows if row["metric"] == "swap_ssim_shared"}
    assert members["s0/s1/group-00/0"] == ["s0", "s1"]


def test_values_are_those_of_both_methods_mask(results):
    """MoA by itself has its changed columns in view, and another SSIM than beside FastComposer's people."""
    mine, theirs = (
        np.asarray(Image.open(results / f"images/moa/test/swap/{name}.0.png")) for name in ("s0", "s5")
    )
    mask = np.zeros((32, 32), dtype=bool)
    mask[:, :20] = True
    found = of(compare(results), "swap_ssim_shared", "moa")["s0/s5/group-00/0"]
    assert found == context.kept(mine, theirs, context.dilate(mask, 0.05)).ssim
    mask[:, 8:] = False
    alone = context.kept(mine, theirs, context.dilate(mask, 0.05))
    assert (alone.ssim < found - 0.001, alone.psnr < 50) == (True, True)


def test_a_request_has_values_for_both_or_neither(results):
    seen = features.read(results / "fastcomposer-features.parquet")
    hidden = samples.read(results / "fastcomposer.parquet")[0]
    seen[hidden["path"]] = look()  # nobody was found
    features.write(results / "fastcomposer-features.parquet", seen)
    samples.write(
        results / "moa.parquet",
        [row for row in samples.read(results / "moa.parquet") if row["subject"] != "s5"],
    )
    rows = compare(results)
    for metric in ("swap_psnr_shared", "prior_ssim_shared"):
        for kind in ("swap", "single"):
            assert set(of(rows, metric, "moa", kind)) == set(of(rows, metric, "fastcomposer", kind))
    units = set(of(rows, "prior_ssim_shared", "moa", hidden["kind"]))
    assert f"{hidden['subject']}/{hidden['prompt_id']}/0" not in units
    assert len(units) == 2 * 5 - 1


def test_another_training_changes_no_value(results):
    """Its people hide more, and of one request it shows nobody."""
    before = of(compare(results), "swap_ssim_shared", "moa")
    for method in ("moa", "fastcomposer"):
        own, seen = (
            samples.read(results / f"{method}.parquet"),
            features.read(results / f"{method}-features.parquet"),
        )
        again = [row | {"train_seed": 1, "path": f"1-{row['path']}"} for row in own]
        wide = np.zeros((32, 32), dtype=bool)
        wide[:, :28] = True
        for row in again:
            (results / row["path"]).parent.mkdir(parents=True, exist_ok=True)
            (results / row["path"]).write_bytes((results / row["path"][2:]).read_bytes())
        seen |= {row["path"]: replace(look(), mask=features.encode_persons(wide)) for row in again}
        seen[again[0]["path"]] = look()
        first = [row | {"train_seed": 0} for row in own]
        samples.write(results / f"{method}.parquet", [*first, *again])
        features.write(results / f"{method}-features.parquet", seen)
    rows = [row for row in compare(results) if row["metric"] == "swap_ssim_shared" and row["method"] == "moa"]
    assert len(rows) > len(before)
    assert {row["unit"]: row["value"] for row in rows if row["train_seed"] == 0} == before
    assert {row["train_seed"] for row in rows} == {0, 1}


def test_without_a_prior_swaps_are_compared_alone(results):
    assert {row["metric"] for row in compare(results, prior=())} == {"swap_psnr_shared", "swap_ssim_shared"}


def test_pairs_of_subjects_with_shared_noise_are_swapped_too():
    rows = [
        row | {"kind": "table2_multi", "seed": 7}
        for row in make_rows("multi", ("moa", "fastcomposer"))
        if row["prompt_id"] == "group-00"
    ]
    found = list(shared.comparisons(rows, []))
    assert {metric for metric, _ in found} == {"swap"} and len(found) == 6 * 5 // 2
    subjects = {(one["subject"], other["subject"]) for _, pairs in found for one, other in pairs}
    assert ("s0+s1", "s1+s2") in subjects
