"""Tables are a function of samples alone, to the byte."""

from __future__ import annotations

import csv
import io
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from evaluation_fakes import make_rows

from moa.data.errors import DataError
from moa.data.records import write_rows
from moa.evaluation import costs, samples, tables, trainings
from moa.evaluation import table as forms
from moa.evaluation.samples import KEPT
from moa.evaluation.statistics import interval
from moa.hashing import ROOT

PUBLISHED = "config/published.yaml"


def kept_rows(methods=("moa", "fastcomposer")):
    rows = []
    for m, method in enumerate(methods):
        for a in range(4):
            for b in range(a + 1, 4):
                rows.append(
                    {
                        "method": method, "train_seed": 0, "split": "test", "kind": "swap", "prompt_id": "p",
                        "prompt_group": "g", "index": 0, "subject": f"s{a}", "other": f"s{b}",
                        "members": [f"s{a}", f"s{b}"],
                        "psnr": None if (a, b) == (0, 1) and m else 30.0 - 5 * m + a + 0.5 * b,
                        "ssim": None if (a, b) == (0, 1) and m else 0.9 - 0.1 * m, "lpips": None,
                        "outside": 0.5,
                    }
                )  # fmt: skip
    return rows


@pytest.fixture
def files(tmp_path):
    rows = make_rows("single") + make_rows("multi")
    samples.write(tmp_path / "samples.parquet", rows)
    write_rows(tmp_path / "kept.parquet", kept_rows(), KEPT)
    return tmp_path


def run(folder, output):
    tables.tables([folder / "samples.parquet"], folder / "kept.parquet", PUBLISHED, output)
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


def read(text: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text.decode())))


def test_main_table_has_the_promised_columns_and_rows(files):
    made = run(files, files / "tables")
    assert made["main.csv"].decode().splitlines()[0] == (
        "method,source,images,ip,ip_low,ip_high,pc,pc_low,pc_high,found"
    )
    rows = read(made["main.csv"])
    assert [r["method"] for r in rows[:3]] == ["prior", "moa", "ceiling"]
    assert {r["source"] for r in rows} == {"measured", "published"}
    own = next(r for r in rows if r["method"] == "moa")
    scores = [r["ip"] for r in make_rows() if r["method"] == "moa"]
    assert own["ip"] == f"{np.mean(scores):.6f}"
    assert float(own["ip_low"]) < float(own["ip"]) < float(own["ip_high"])
    assert (own["images"], own["found"]) == ("12", "0.833333")
    paper = next(r for r in rows if r["method"] == "MoA")
    assert (paper["ip"], paper["pc"], paper["ip_low"], paper["images"]) == ("0.555000", "0.202000", "", "")


def test_tables_are_the_same_bytes_whatever_the_order(files):
    before = run(files, files / "one")
    rows = make_rows("single") + make_rows("multi")
    samples.write(files / "samples.parquet", rows[::-1])
    assert run(files, files / "two") == before
    assert set(before) == {
        *(f"{name}.{form}" for name in ("main", "multi", "context") for form in ("csv", "md", "tex")),
        "table3.csv", "table3.md", "table3.tex",
        "differences.csv", "progress.csv", "groups.csv",
    }  # fmt: skip


def test_times_do_not_enter_quality_tables(files):
    before = run(files, files / "one")
    rows = [{**r, "seconds": 99.0} for r in make_rows("single") + make_rows("multi")]
    samples.write(files / "samples.parquet", rows)
    assert run(files, files / "two") == before


def test_differences_are_paired_and_progress_is_a_share(files):
    made = run(files, files / "tables")
    row = next(
        r for r in read(made["differences.csv"])
        if (r["kind"], r["metric"], r["method"], r["minus"]) == ("single", "ip", "moa", "prior")
    )  # fmt: skip
    assert (row["difference"], row["difference_low"], row["difference_high"]) == ("0.300000",) * 3
    way = next(r for r in read(made["progress.csv"]) if (r["kind"], r["method"]) == ("single", "moa"))
    assert (way["way"], way["way_low"]) == ("0.500000", "0.500000")


def test_methods_with_other_requests_are_not_compared(files):
    rows = [r for r in make_rows("single") if not (r["method"] == "moa" and r["subject"] == "s0")]
    samples.write(files / "samples.parquet", rows)
    with pytest.raises(ValueError, match="one side only"):
        run(files, files / "tables")


def test_context_table_counts_what_was_left_out(files):
    rows = read(run(files, files / "tables")["context.csv"])
    moa, other, gap = rows
    assert [(r["method"], r["minus"]) for r in rows] == [
        ("moa", ""),
        ("fastcomposer", ""),
        ("fastcomposer", "moa"),
    ]
    assert (moa["pairs"], moa["left_out"], other["pairs"], other["left_out"]) == ("6", "0", "5", "1")
    assert (gap["pairs"], gap["psnr"], gap["psnr_low"]) == ("5", "-5.000000", "-5.000000")


def test_a_pair_s_context_is_the_mean_of_its_trainings(files):
    """Of one pair a training has no value: it counts once, like the others."""
    own = kept_rows(("moa",))
    again = [{**row, "train_seed": 1, "psnr": row["psnr"] + 10} for row in own]
    again[0] |= {"psnr": None, "ssim": None}
    write_rows(files / "kept.parquet", own + again, KEPT)
    (row,) = read(run(files, files / "tables")["context.csv"])
    first = np.array([r["psnr"] for r in own])
    assert (row["pairs"], row["left_out"]) == ("6", "0")
    assert float(row["psnr"]) == pytest.approx(np.mean([first[0], *(first[1:] + 5)]))


def test_context_table_is_of_swaps_alone(files):
    """Other kinds whose subjects share their noise have pairs, too."""
    before = run(files, files / "tables")["context.csv"]
    others = [{**row, "kind": "occluded", "psnr": 5.0, "ssim": 0.1} for row in kept_rows()]
    write_rows(files / "kept.parquet", kept_rows() + others, KEPT)
    assert run(files, files / "tables")["context.csv"] == before


def test_method_whose_pairs_were_all_left_out_stays_in_the_context_table(files):
    rows = kept_rows()
    for row in rows:
        if row["method"] == "fastcomposer":
            row["psnr"] = row["ssim"] = None
    write_rows(files / "kept.parquet", rows, KEPT)
    last = read(run(files, files / "tables")["context.csv"])[-1]
    assert (last["method"], last["minus"], last["pairs"], last["left_out"]) == ("fastcomposer", "", "0", "6")
    assert last["psnr"] == last["outside_low"] == ""


@pytest.mark.parametrize(
    ("kinds", "names"),
    [
        (["multi"], {"multi.csv", "multi.md", "multi.tex", "differences.csv", "progress.csv", "groups.csv"}),
        (["swap"], {"context.csv", "context.md", "context.tex"}),
    ],
)
def test_kinds_that_were_not_made_have_no_tables(files, kinds, names):
    samples.write(files / "samples.parquet", [row for kind in kinds for row in make_rows(kind)])
    write_rows(files / "kept.parquet", [], KEPT)
    assert set(run(files, files / "tables")) == names


def test_methods_that_were_not_made_have_no_rows(files):
    samples.write(files / "samples.parquet", make_rows("single", ("moa",)))
    made = run(files, files / "tables")
    assert [r["method"] for r in read(made["main.csv"]) if r["source"] == "measured"] == ["moa"]
    assert read(made["differences.csv"]) == read(made["progress.csv"]) == []


def test_no_samples_is_said(files):
    samples.write(files / "samples.parquet", [])
    with pytest.raises(DataError, match="generate and score"):
        run(files, files / "tables")


def test_one_subject_has_means_but_no_intervals(files):
    samples.write(files / "samples.parquet", [r for r in make_rows("single") if r["subject"] == "s1"])
    row = read(run(files, files / "tables")["main.csv"])[0]
    assert row["ip"]
    assert row["ip_low"] == row["ip_high"] == ""


def test_reading_forms():
    table = forms.Table(("method", "x", "x_low", "x_high", "n"), [
        {"method": "a_b", "x": 0.5, "x_low": 0.41, "x_high": 0.59, "n": 3}, {"method": "c", "x": 1.0},
    ], ("A note.",))  # fmt: skip
    assert forms.to_markdown(table).splitlines() == [
        "| method | x | n |", "| --- | --- | --- |", "| a_b | 0.500 [0.410, 0.590] | 3 |",
        "| c | 1.000 |  |", "", "A note.",
    ]  # fmt: skip
    latex = forms.to_latex(table)
    assert r"a\_b & 0.500 [0.410, 0.590] & 3 \\" in latex
    assert latex.startswith(r"\begin{tabular}{lll}")
    signs = forms.to_latex(forms.Table(("a",), [{"a": "x − y > 0 ≠ 1 < 2"}]))
    assert r"x $-$ y $>$ 0 $\neq$ 1 $<$ 2 \\" in signs
    assert forms.to_latex(forms.Table(("a",), [{"a": r"\~^"}])).splitlines()[4] == (
        r"\textbackslash{}\textasciitilde{}\textasciicircum{} \\"
    )
    words = forms.Table(("claim", "n"), [{"claim": "so " * 20, "n": n} for n in range(41)])
    made = forms.to_latex(words).splitlines()
    assert (made[0], made[-1]) == (r"\begin{longtable}{p{0.75\linewidth}l}", r"\end{longtable}")
    assert forms.to_csv(table) == "method,x,x_low,x_high,n\na_b,0.500000,0.410000,0.590000,3\nc,1.000000,,,\n"


def test_table_3_has_measured_beside_published_and_the_difference(files):
    rows = make_rows("single", ("prior", "fastcomposer", "moa"))
    samples.write(files / "samples.parquet", rows)
    made = run(files, files / "tables")
    table = read(made["table3.csv"])
    assert set(made) >= {"table3.md", "table3.tex"}
    moa, paper = (next(r for r in table if r["published_as"].startswith(name)) for name in ("MoA:", "ELITE:"))
    main = next(r for r in read(made["main.csv"]) if r["method"] == "moa")
    assert (moa["method"], moa["ip"], moa["ip_published"]) == ("moa", main["ip"], "0.555000")
    for side in ("", "_low", "_high"):
        assert float(moa[f"ip_difference{side}"]) == pytest.approx(float(main[f"ip{side}"]) - 0.555, abs=2e-4)
    assert (paper["method"], paper["ip"], paper["ip_published"], paper["pc_difference"]) == (
        "", "", "0.228000", "",
    )  # fmt: skip
    own = [r for r in table if r["method"] == "fastcomposer"]
    assert [r["pc_published"] for r in own] == ["0.243000", "0.229000"]
    (gap,) = [r for r in table if "−" in r["method"]]  # of the one reference that has both
    assert (gap["method"], gap["ip_published"]) == ("moa − fastcomposer", "0.041000")
    assert (gap["ip"], gap["ip_low"], gap["ip_difference"]) == ("0.300000", "0.300000", "0.259000")


def test_published_rows_are_those_of_the_papers_table_3(files):
    """Method, OF (as section 2.1 sorts methods), IP and PC."""
    printed = [
        ("ELITE", "yes", 0.228, 0.146),
        ("DreamBooth", "no", 0.273, 0.239),
        ("Custom-Diffusion", "no", 0.434, 0.233),
        ("FastComposer", "yes", 0.514, 0.243),
        ("Subject-Diffusion", "yes", 0.605, 0.228),
        ("MoA", "yes", 0.555, 0.202),
    ]
    samples.write(files / "samples.parquet", make_rows("single", ("prior", "fastcomposer", "moa")))
    table = read(run(files, files / "tables")["table3.csv"])
    rows = {r["published_as"]: r for r in table if r["published_as"].endswith("Table 3")}
    found = [
        (r["optimization_free"], float(r["ip_published"]), float(r["pc_published"]))
        for r in (rows[f"{name}: MoA (arXiv 2404.11565), Table 3"] for name, *_ in printed)
    ]
    assert found == [tuple(values) for _, *values in printed]
    elsewhere = [r for r in table if r["published_as"] not in rows]
    assert elsewhere and not any(r["optimization_free"] for r in elsewhere)


def test_whom_a_method_was_shown_belongs_to_its_intervals(files):
    """A wrong subject is the subject of another row, so that these two rows share a person."""
    rng = np.random.default_rng(0)
    rows = make_rows("single", ("moa", "moa_wrong_subject"))
    for row in rows:
        row["ip"] = float(rng.uniform())
        if row["method"] == "moa_wrong_subject":
            row["members"] = [row["subject"], f"s{(int(row['subject'][1]) + 1) % 6}"]
    samples.write(files / "samples.parquet", rows)
    made = run(files, files / "tables")
    main = {r["method"]: r for r in read(made["main.csv"]) if r["source"] == "measured"}
    moa, wrong = ([r for r in rows if r["method"] == m] for m in ("moa", "moa_wrong_subject"))
    values = [[r["ip"] for r in part] for part in (moa, wrong)]
    less = [b - a for a, b in zip(*values, strict=True)]
    (gap,) = [r for r in read(made["differences.csv"]) if r["metric"] == "ip"]
    for row, name, value, part in (
        (main["moa"], "ip", values[0], moa),
        (main["moa_wrong_subject"], "ip", values[1], wrong),
        (gap, "difference", less, wrong),
    ):
        expected = interval(value, [r["members"] for r in part])
        assert (row[f"{name}_low"], row[f"{name}_high"]) == (f"{expected.low:.6f}", f"{expected.high:.6f}")


def test_whom_either_method_was_shown_belongs_to_the_difference_of_swaps():
    """Whichever of the two comes first in the table."""
    moa, other = (
        [row for row in kept_rows((method,)) if row["psnr"] is not None] for method in ("moa", "prior")
    )
    rng = np.random.default_rng(0)
    for row in (*moa, *other):
        row["psnr"] = float(rng.normal(30, 5))
    for row in other[:3]:
        row["members"] = ["s9", *row["members"]]  # shown in half of its images
    less = [a["psnr"] - b["psnr"] for a, b in zip(moa, other, strict=True)]
    expected = interval(less, [row["members"] for row in other])
    assert expected != interval(less, [row["members"] for row in moa])
    (gap,) = [row for row in tables.kept_context([*moa, *other]).rows if row["minus"]]
    assert (gap["method"], gap["minus"]) == ("moa", "prior")
    assert (gap["psnr"], gap["psnr_low"], gap["psnr_high"]) == pytest.approx(
        (expected.mean, expected.low, expected.high)
    )


def several_trainings():
    """fastcomposer with seeds 0 and 1, moa with 0, 1 and 2, the prior none; IP differs by it alone."""
    rows = []
    for row in make_rows("single", ("prior", "fastcomposer", "moa")):
        seeds = {"prior": [None], "fastcomposer": [0, 1], "moa": [0, 1, 2]}[row["method"]]
        for seed in seeds:
            path = f"{seed}/{row['path']}"
            rows.append({**row, "train_seed": seed, "ip": row["ip"] + 0.04 * (seed or 0), "path": path})
    return rows


def test_the_spread_over_trainings_is_shown_apart(files):
    rows = several_trainings()
    samples.write(files / "samples.parquet", rows)
    made = run(files, files / "tables")
    table = {(r["metric"], r["method"], r["minus"]): r for r in read(made["seeds.csv"])}
    assert set(made) >= {"seeds.md", "seeds.tex"}
    assert ("ip", "prior", "") not in table
    moa = table["ip", "moa", ""]
    means = [
        np.mean([r["ip"] for r in rows if (r["method"], r["train_seed"]) == ("moa", s)]) for s in range(3)
    ]
    assert (moa["trainings"], moa["least"], moa["most"]) == ("3", f"{means[0]:.6f}", f"{means[2]:.6f}")
    assert (moa["value"], moa["sd"]) == (f"{means[1]:.6f}", "0.040000")
    main = next(r for r in read(made["main.csv"]) if r["method"] == "moa")
    assert [moa[f"value{s}"] for s in ("", "_low", "_high")] == [
        main[f"ip{s}"] for s in ("", "_low", "_high")
    ]
    assert "mean of 3 trainings" in made["main.md"].decode()
    gap = table["ip", "fastcomposer", "moa"]  # later method less earlier one, as in differences.csv
    mean = float(gap["value"])
    assert (gap["trainings"], gap["value_low"]) == ("6", gap["value"])
    assert (float(gap["least"]), float(gap["most"])) == pytest.approx((mean - 0.06, mean + 0.06), abs=2e-4)
    assert float(gap["sd"]) == pytest.approx(np.sqrt(0.04**2 + 0.04**2 / 2), abs=1e-4)
    assert table["pc", "moa", ""]["sd"] == "0.000000"
    assert "seeds.csv" not in run_single_training(files)


def test_methods_that_share_their_weights_are_compared_training_by_training(files):
    """A training that makes both better says nothing of their difference."""
    rows = [
        {**row, "train_seed": seed, "ip": row["ip"] + 0.04 * seed, "path": f"{seed}/{row['path']}"}
        for row in make_rows("single", ("moa", "moa_wrong_subject"))
        for seed in range(3)
    ]
    found = {
        (row["metric"], row["method"], row.get("minus")): row
        for row in trainings.trainings(rows, "single").rows
    }
    gap, own = found["ip", "moa_wrong_subject", "moa"], found["ip", "moa", None]
    assert gap["trainings"] == own["trainings"] == 3
    assert gap["least"] == pytest.approx(gap["value"]) and gap["most"] == pytest.approx(gap["value"])
    assert gap["sd"] == pytest.approx(0, abs=1e-9) and own["sd"] == pytest.approx(0.04)


def test_one_training_each_is_no_mean_of_two(files):
    rows = [
        r for r in several_trainings() if (r["method"], r["train_seed"]) in (("moa", 1), ("fastcomposer", 0))
    ]
    assert not [note for note in tables.quality(rows).notes if "trainings" in note]


def run_single_training(files):
    samples.write(files / "samples.parquet", make_rows("single"))
    return run(files, files / "once")


def test_an_interval_does_not_shrink_because_a_method_was_trained_twice(files):
    once = [r for r in several_trainings() if r["train_seed"] in (None, 0)]
    twice = once + [
        {**r, "train_seed": 1, "path": f"again/{r['path']}"} for r in once if r["train_seed"] == 0
    ]
    one, two = (tables.quality(rows).rows for rows in (once, twice))
    for a, b in zip(one, two, strict=True):
        assert [b[f"ip{s}"] for s in ("", "_low", "_high")] == pytest.approx(
            [a[f"ip{s}"] for s in ("", "_low", "_high")]
        )


def kept_row(method, seed, subject, other, psnr):
    return {
        "method": method, "train_seed": seed, "split": "test", "kind": "swap", "prompt_id": "p", "index": 0,
        "subject": subject, "other": other, "members": [subject, other], "psnr": psnr, "ssim": psnr and 0.5,
        "lpips": None, "outside": 0.5,
    }  # fmt: skip


def test_the_spread_of_the_kept_context_is_over_pairs_of_all_trainings():
    """A pair that one training lost somebody in would be missing from its mean only."""
    pairs = list(itertools.combinations("abcd", 2))
    rows = [kept_row("moa", seed, *pair, 20.0 + seed) for seed in (0, 1) for pair in pairs]
    rows[0] |= {"psnr": None, "ssim": None}
    rows[6] |= {"psnr": 99.0}  # of the same pair, with the other seed
    rows += [kept_row("prior", None, *pair, 50.0) for pair in pairs]
    psnr, ssim = trainings.trainings_of_swaps(rows).rows
    assert (psnr["kind"], psnr["metric"], psnr["method"]) == ("swap", "swap_psnr", "moa")
    assert (psnr["trainings"], psnr["value"], psnr["least"], psnr["most"]) == (2, 20.5, 20.0, 21.0)
    assert psnr["sd"] == pytest.approx(0.5**0.5)
    assert (ssim["metric"], ssim["sd"]) == ("swap_ssim", 0.0)


def test_costs_of_several_trainings_are_their_mean(files):
    for n, seconds in enumerate((60.0, 80.0)):
        about = {"trained_parameters": 7, "seconds": seconds, "peak_memory_bytes": (3 - n) * 2**20}
        about["peak_gpu_bytes"] = n * 2**20
        (files / f"train{n}.json").write_text(json.dumps(about))
    training = [f"moa={files / f'train{n}.json'}" for n in range(2)]
    costs.costs([files / "samples.parquet"], files / "cost.csv", training=training)
    row = next(r for r in read((files / "cost.csv").read_bytes()) if r["method"] == "moa")
    names = "trained_parameters", "train_seconds", "train_peak_mb", "train_peak_gpu_mb"
    assert [row[name] for name in names] == ["7", "70.000000", "3.000000", "1.000000"]
    assert "| moa |" in (files / "cost.md").read_text() and "moa &" in (files / "cost.tex").read_text()


def test_costs(files):
    about = {"trained_parameters": 7, "seconds": 60.5, "peak_memory_bytes": 3 * 2**20, "peak_gpu_bytes": 0}
    (files / "train.json").write_text(json.dumps(about))
    for name, peak, gpu in (("a.json", 120.5, 8), ("b.json", 90, 0)):
        spent = {"peak_memory_bytes": peak * 2**20, "peak_gpu_bytes": gpu * 2**20}
        (files / name).write_text(json.dumps(spent))
    costs.costs(
        [files / "samples.parquet"],
        files / "cost.csv",
        training=[f"moa={files / 'train.json'}"],
        memory=[f"moa={files / 'a.json'}", f"moa={files / 'b.json'}", f"prior={files / 'b.json'}"],
    )
    rows = {r["method"]: r for r in read((files / "cost.csv").read_bytes())}
    assert list(rows["moa"]) == list(costs.COST)
    assert rows["moa"] == {
        "method": "moa", "images": "24", "seconds_per_image": "0.500000",
        "peak_mb": "120.500000", "peak_gpu_mb": "8.000000", "trained_parameters": "7",
        "train_seconds": "60.500000", "train_peak_mb": "3.000000", "train_peak_gpu_mb": "",
    }  # fmt: skip
    assert (rows["prior"]["peak_mb"], rows["prior"]["peak_gpu_mb"]) == ("90.000000", "")  # on a CPU
    assert rows["ceiling"]["peak_mb"] == rows["prior"]["train_seconds"] == ""
    (files / "train.json").write_text("{}")
    with pytest.raises(DataError, match=r"train\.json.*train again"):
        costs.training_cost(files / "train.json")
    (files / "a.json").write_text("{}")
    with pytest.raises(DataError, match=r"a\.json holds no peaks of memory.*generate again"):
        costs.generation_memory(files / "a.json")


def test_published_rows_need_their_reference(tmp_path):
    (tmp_path / "p.yaml").write_text("- {method: X, ip: 0.1, pc: 0.2}\n")
    with pytest.raises(DataError, match="lacks reference"):
        tables.read_published(tmp_path / "p.yaml")
    assert len([r for r in tables.read_published(PUBLISHED) if "Table 3" in r["reference"]]) == 6


def test_what_only_reads_results_starts_without_pytorch():
    """A second instead of five, for each job that tabulates, measures or draws."""
    modules = ("evaluation.claims", "evaluation.costs", "evaluation.tables", "evaluation.measures")
    modules += ("evaluation.swaps", "evaluation.preserved", "evaluation.shared", "figures.grids", "report")
    imports = "; ".join(f"import moa.{module}" for module in modules)
    said = subprocess.run(
        [sys.executable, "-c", f"{imports}; import sys; print('torch' in sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.strip() == "False"


def test_a_rounded_zero_has_no_sign():
    row = {"x": -0.0002, "x_low": -0.0482, "x_high": -0.0001}
    shown = forms.to_markdown(forms.Table(("x", "x_low", "x_high"), [row])).splitlines()
    assert shown[-1] == "| 0.000 [-0.048, 0.000] |"
