"""The tuning grid's table: validation samples alone, the main kind apart from swaps."""

from __future__ import annotations

import csv
import json
import math

import pytest
from evaluation_fakes import make_rows

from moa.data.records import write_rows
from moa.evaluation import samples, tuning
from moa.evaluation.samples import KEPT


def kept(*psnr):
    same = {
        "method": "moa",
        "train_seed": 0,
        "split": "validation",
        "kind": "swap",
        "prompt_id": "p",
        "prompt_group": "g",
        "index": 0,
    }
    return [
        same | {"subject": "s0", "other": f"s{i + 1}", "members": ["s0", f"s{i + 1}"], "psnr": value,
                "ssim": None if value is None else 0.5, "lpips": None, "outside": 0.5}
        for i, value in enumerate(psnr)
    ]  # fmt: skip


@pytest.fixture
def trial(tmp_path):
    """Makes a folder as a trial leaves it, of one method's validation rows."""

    def make(name, swaps=(20.0, 30.0), split="validation"):
        rows = [row | {"split": split} for row in make_rows("single") if row["method"] == "moa"]
        swapped = [row | {"kind": "swap", "ip": 0.0, "pc": 0.0, "found": False} for row in rows]
        samples.write(tmp_path / name / "samples.parquet", rows + swapped)
        write_rows(tmp_path / name / "kept.parquet", kept(*swaps), KEPT)
        return f"moa/{name}={tmp_path / name}", rows

    return make


def table(tmp_path, *trials):
    changes = json.dumps({"moa": {"default": {}, "other": {"sampling": {"guidance": 2.0}}}})
    tuning.tabulate(trials, changes, tmp_path / "tuning.csv")
    return list(csv.DictReader((tmp_path / "tuning.csv").open()))


def test_scores_are_of_single_subjects_and_psnr_of_swaps(trial, tmp_path):
    (one, rows), (other, _) = trial("default"), trial("other", swaps=(None, 12.0))
    first, second = table(tmp_path, one, other)
    ip, pc = (sum(row[name] for row in rows) / len(rows) for name in ("ip", "pc"))
    assert int(first["images"]) == len(rows)
    assert float(first["ip"]) == pytest.approx(ip, abs=1e-4)
    assert float(first["score"]) == pytest.approx(math.sqrt(ip * pc), abs=1e-4)
    assert float(first["found"]) == pytest.approx(sum(row["found"] for row in rows) / len(rows), abs=1e-4)
    assert (int(first["swaps"]), float(first["psnr"])) == (2, 25.0)
    assert (int(second["swaps"]), float(second["psnr"])) == (1, 12.0)
    assert (first["trial"], first["changes"]) == ("default", "{}")
    assert json.loads(second["changes"]) == {"sampling": {"guidance": 2.0}}


def test_a_protocol_without_swaps_leaves_the_column_empty(trial, tmp_path):
    (row,) = table(tmp_path, trial("default", swaps=())[0])
    assert (row["swaps"], row["psnr"]) == ("0", "")


def test_test_subjects_are_refused(trial, tmp_path):
    entry, _ = trial("default", split="test")
    with pytest.raises(ValueError, match="default holds test samples"):
        table(tmp_path, entry)
