"""The ledger follows its rule, says what is missing, and its formulas are written down."""

from __future__ import annotations

import csv
import io
import re

import numpy as np
import pytest
from evaluation_fakes import make_rows

from moa.data.errors import DataError
from moa.data.records import write_rows
from moa.evaluation import claims, measures, samples
from moa.evaluation.claims import Claim, judge, verdict
from moa.evaluation.measures import MEASURE, Measures
from moa.evaluation.samples import KEPT
from moa.evaluation.statistics import Interval
from moa.hashing import ROOT

LEDGER = ROOT / "config/claims.yaml"


@pytest.mark.parametrize(
    ("low", "high", "side", "bound", "expected"),
    [
        (0.1, 0.3, "above", 0, "holds"), (-0.3, -0.1, "above", 0, "does not hold"),
        (-0.1, 0.1, "above", 0, "undecided"), (0.0, 0.3, "above", 0, "undecided"),
        (0.1, 0.3, "below", 0, "does not hold"), (-0.3, -0.1, "below", 0, "holds"),
        (-0.2, 0.1, "below", 0, "undecided"), (0.02, 0.03, "below", 0.04, "holds"),
        (-0.03, -0.01, "above", -0.04, "holds"), (-0.05, -0.01, "above", -0.04, "undecided"),
        (-0.08, -0.05, "above", -0.04, "does not hold"), (20, 25, "above", 30, "does not hold"),
        (0.1, 0.3, "apart", 0, "holds"), (-0.3, -0.1, "apart", 0, "holds"),
        (-0.1, 0.1, "apart", 0, "undecided"), (np.nan, np.nan, "above", 0, "undecided"),
        (np.nan, np.nan, "below", 0, "undecided"), (np.nan, np.nan, "apart", 0, "undecided"),
    ],
)  # fmt: skip
def test_the_rule(low, high, side, bound, expected):
    assert verdict(Interval((low + high) / 2, low, high), side, bound) == expected


@pytest.fixture
def measured():
    rows = make_rows("single", ("prior", "moa"))
    return Measures(measures.of_samples(rows))


def test_a_claim_is_tested_by_the_paired_difference(measured):
    row = judge(Claim("c", "1", "ip", minus="prior"), measured)
    assert [row[f"value{side}"] for side in ("", "_low", "_high")] == pytest.approx([0.3] * 3)
    assert (row["units"], row["holds_if"], row["verdict"]) == (12, "> 0", "holds")
    assert row["effect"] == "ip, single: moa − prior"
    assert judge(Claim("c", "1", "ip", minus="prior", side="below"), measured)["verdict"] == "does not hold"
    assert (
        judge(Claim("c", "1", "pc", minus="prior", bound=-0.041, note="n"), measured)["holds_if"]
        == "> −0.041"
    )


def test_what_was_not_made_is_said_and_nothing_fails(measured):
    missing = judge(Claim("c", "1", "ip", minus="fastcomposer"), measured)
    assert (missing["verdict"], missing["note"]) == ("not measured", "no ip of fastcomposer, single")
    assert judge(Claim("c", "1", "leak", kind="multi"), measured)["note"] == "no leak of moa, multi"
    assert judge(Claim("c", "1", "ip", slope_on="leak"), measured)["verdict"] == "not measured"
    assert judge(Claim("c", "1", note="no judge"), measured)["verdict"] == "not measurable here"
    assert {judge(claim, Measures([]))["verdict"] for claim in claims.read_claims(LEDGER)} == {
        "not measured", "not measurable here",
    }  # fmt: skip


def test_one_subject_decides_nothing():
    rows = [row for row in make_rows("single", ("prior", "moa")) if row["subject"] == "s1"]
    found = judge(Claim("c", "1", "ip", minus="prior"), Measures(measures.of_samples(rows)))
    assert (found["value"], found["verdict"]) == (pytest.approx(0.3), "undecided")


def test_slopes_are_within_prompts():
    """Prompts differ in both measures the other way round; only what happens inside them counts."""
    rng = np.random.default_rng(0)
    rows = []
    for row in make_rows("single", ("moa",)):
        size, prompt = float(rng.uniform(0.1, 0.5)), int(row["prompt_id"][-1])
        rows.append({**row, "found": True, "face_size": size + prompt, "ip": 0.5 * size - 2 * prompt + 3})
    found = judge(Claim("c", "6", "ip", slope_on="size"), Measures(measures.of_samples(rows)))
    assert (found["value"], found["value_low"], found["verdict"]) == (
        pytest.approx(0.5), pytest.approx(0.5), "holds",
    )  # fmt: skip


def test_every_claim_has_a_measure_with_a_formula():
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    ledger = claims.read_claims(LEDGER)
    used = {name for claim in ledger for name in (claim.metric, claim.slope_on) if name}
    assert used <= documented
    assert len({claim.claim for claim in ledger}) == len(ledger)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{claim: c, section: s, metrics: ip}", r"unknown key .*\[0\]\.metrics"),
        ("{claim: c, section: s}", "needs a note"),
        ("{claim: c, section: s, metric: ip, bound: 1.0}", "needs a note"),
        ("{claim: c, section: s, metric: ip, side: left}", "side must be one of"),
        ("{claim: c, section: s, metric: ip, minus: prior, slope_on: size}", "not both"),
    ],
)
def test_mistyped_claims_are_refused(tmp_path, entry, message):
    (tmp_path / "claims.yaml").write_text(f"- {entry}\n")
    with pytest.raises(ValueError, match=message):
        claims.read_claims(tmp_path / "claims.yaml")


def test_sizes_share_their_bands_between_methods():
    rows = [
        {**row, "found": n % 12 > 2, "face_size": (n % 12 + (n > 11) / 2) / 24, "ip": 0.01 * n}
        for n, row in enumerate(make_rows("single", ("prior", "moa")))
    ]
    table = claims.by_size(rows).rows
    assert [(row["method"], row["images"]) for row in table] == [
        ("prior", 3), ("prior", 3), ("prior", 3), ("moa", 3), ("moa", 3), ("moa", 3),
    ]  # fmt: skip
    assert [row["size_from"] for row in table[:3]] == [row["size_from"] for row in table[3:]]
    largest = [row["ip"] for row in rows if row["method"] == "moa" and row["face_size"] >= 9 / 24]
    assert table[-1]["ip"] == pytest.approx(np.mean(largest))


def run(folder, output):
    write_rows(folder / "kept.parquet", [], KEPT)
    write_rows(folder / "measures.parquet", [], MEASURE)
    claims.tabulate(
        LEDGER, [folder / "samples.parquet"], folder / "kept.parquet", [folder / "measures.parquet"], output
    )
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


def test_tables_are_the_same_bytes_whatever_the_order_and_times(tmp_path):
    rows = make_rows("single") + make_rows("multi")
    samples.write(tmp_path / "samples.parquet", rows)
    before = run(tmp_path, tmp_path / "one")
    samples.write(tmp_path / "samples.parquet", [{**row, "seconds": 99.0} for row in rows[::-1]])
    assert run(tmp_path, tmp_path / "two") == before
    assert set(before) == {
        *(f"{name}.{form}" for name in ("claims", "metrics") for form in ("csv", "md", "tex")), "sizes.csv",
    }  # fmt: skip
    ledger = list(csv.DictReader(io.StringIO(before["claims.csv"].decode())))
    assert len(ledger) == len(claims.read_claims(LEDGER))
    verdicts = {row["claim"]: row["verdict"] for row in ledger}
    assert verdicts["shows the subject of the photo, without training on it"] == "holds"
    assert verdicts["prompt followed no less than by the prior"] == "does not hold"
    assert verdicts["identity preserved better than by FastComposer"] == "not measured"


def test_no_samples_is_said(tmp_path):
    samples.write(tmp_path / "samples.parquet", [])
    with pytest.raises(DataError, match="generate and score"):
        run(tmp_path, tmp_path / "tables")
