"""The ablation table: validation subjects alone, each ablation beside the method as it is."""

from __future__ import annotations

import csv
import json

import pytest
from evaluation_fakes import make_rows

from moa.data.records import read_rows, write_rows
from moa.evaluation import ablations, claims, samples
from moa.evaluation.measures import MEASURE, Measures
from moa.evaluation.preserved import PRESERVED
from moa.evaluation.samples import KEPT
from moa.hashing import ROOT

CHANGES = {
    "moa": {
        "no-moa-layer": {"train": {"router": "none"}},
        "default": {},
        "null-prior": {"sampling": {"null_branch": "prior"}},
    }
}


@pytest.fixture
def trial(tmp_path):
    """Makes a folder as a trial leaves it: IP and context differ from the reference's as asked."""

    def make(name, ip=0.0, kept=0.5, split="validation"):
        rows = [
            row | {"split": split} for row in make_rows("single", ("prior", "moa")) if row["method"] == "moa"
        ]
        rows = [row | {"ip": row["ip"] + ip} for row in rows]
        samples.write(tmp_path / name / "samples.parquet", rows)
        write_rows(tmp_path / name / "kept.parquet", [], KEPT)
        same = [{key: row[key] for key in PRESERVED.names if key in row} for row in rows]
        likeness = {"psnr": 20.0, "ssim": 0.4 + kept, "lpips": None, "layout": 0.5}
        noise = {"noise_psnr": 10.0, "noise_ssim": 0.4, "noise_lpips": None, "noise_layout": 0.5}
        preserved = [row | likeness | noise | {"noise_subjects": row["members"]} for row in same]
        write_rows(tmp_path / name / "preserved.parquet", preserved, PRESERVED)
        return f"moa/{name}={tmp_path / name}"

    return make


@pytest.fixture
def table(trial, tmp_path):
    trials = [trial("no-moa-layer", ip=-0.1, kept=0.1), trial("default"), trial("null-prior")]
    ablations.tabulate(trials, json.dumps(CHANGES), tmp_path / "measures.parquet", tmp_path)
    return {row["ablation"]: row for row in csv.DictReader((tmp_path / "ablations.csv").open())}


def test_the_reference_comes_first_and_the_others_are_paired_with_it(table, tmp_path):
    assert list(table) == ["default", "no-moa-layer", "null-prior"]
    reference, ablated = table["default"], table["no-moa-layer"]
    assert (reference["ip_difference"], reference["trained"], reference["changes"]) == ("", "no", "")
    assert (ablated["trained"], ablated["changes"]) == ("yes", "train.router=none")
    assert [ablated[f"ip_difference{side}"] for side in ("", "_low", "_high")] == ["-0.100000"] * 3
    assert float(ablated["ip"]) == pytest.approx(float(reference["ip"]) - 0.1, abs=1e-4)
    assert (reference["seed_ssim"], ablated["seed_ssim"]) == ("0.500000", "0.100000")
    assert (table["null-prior"]["trained"], table["null-prior"]["ip_difference"]) == ("no", "0.000000")
    assert "multi_ip" not in reference  # no such images
    assert "| default |" in (tmp_path / "ablations.md").read_text()
    assert "no-moa-layer &" in (tmp_path / "ablations.tex").read_text()


def test_the_ledger_reads_them(table, tmp_path):
    """Appendix B's claims are judged by the ablations, and not measured without."""
    measured = Measures(read_rows(tmp_path / "measures.parquet", MEASURE))
    ledger = {claim.claim: claim for claim in claims.read_claims(ROOT / "config/claims.yaml")}
    lost = ledger["without the MoA layer the context is mostly lost"]
    row = claims.judge(lost, measured)
    assert (row["verdict"], row["value"], row["units"]) == ("holds", pytest.approx(0.2), 12)
    assert claims.judge(lost, Measures([]))["verdict"] == "not measured"
    without = claims.judge(ledger["without conditioning on t and l (Eq. 8) identity is worse"], measured)
    assert (without["verdict"], without["note"]) == ("not measured", "no ip of moa:no-spacetime, single")


def test_ablations_stay_out_of_the_tables_of_test_subjects(table, tmp_path):
    samples.write(tmp_path / "samples.parquet", make_rows("single", ("prior", "moa")))
    claims.tabulate(
        ROOT / "config/claims.yaml",
        [tmp_path / "samples.parquet"],
        tmp_path / "tables",
        ablations=[tmp_path / "measures.parquet"],
    )
    made = {row["claim"]: row for row in csv.DictReader((tmp_path / "tables/claims.csv").open())}
    assert made["without the MoA layer the context is mostly lost"]["verdict"] == "holds"
    assert "moa:" not in (tmp_path / "tables/metrics.csv").read_text()


def test_test_subjects_are_refused(trial, tmp_path):
    with pytest.raises(ValueError, match="default holds test samples"):
        ablations.gather([trial("default", split="test")])


def test_without_a_reference_nothing_is_compared(trial):
    with pytest.raises(ValueError, match=r"ablations\.moa: none changes nothing; add `default: \{\}`"):
        ablations.table(Measures([]), {"moa": {"a": {"train": {"router": "none"}}}})
