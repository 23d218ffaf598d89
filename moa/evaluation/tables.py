"""The `tables` stage: samples to tables of quality. No image is opened and no model runs here.

They hold nothing that changes from run to run (times and memory have a table of their own), so the same
samples give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from moa.config import read_list
from moa.data.errors import DataError
from moa.data.records import read_rows
from moa.evaluation import samples
from moa.evaluation.groups import (
    METRICS,
    Rows,
    by_method,
    mean_of,
    members_of,
    pair_of,
    per_request,
    seeds_of,
)
from moa.evaluation.samples import KEPT, Row
from moa.evaluation.statistics import Interval, difference, interval, ratio
from moa.evaluation.table import FORMS, Table, joined, limits, save
from moa.evaluation.trainings import trainings, trainings_of_swaps

MAIN = ("method", "source", "images", "ip", "ip_low", "ip_high", "pc", "pc_low", "pc_high", "found")
KEPT_METRICS = ("psnr", "ssim", "lpips", "outside")
NO_VALUE = "not measured"


def quality(rows: Rows, published: Rows = ()) -> Table:
    """The main table's columns, for samples of one kind, with published rows below the measured ones.

    Raises DataError if there are no samples.
    """
    if not rows:
        raise DataError("no samples of this split and kind: generate and score its images first")
    table: list[dict[str, Any]] = []
    for method, own in by_method(rows).items():
        found = sum(row["found"] for row in own) / len(own)
        scores = limits("ip", mean_of(own, "ip")) | limits("pc", mean_of(own, "pc"))
        table.append({"method": method, "source": "measured", "images": len(own), **scores, "found": found})
    notes = ["Measured rows: mean over images, with 95 % intervals whose unit is the subject."]
    if (count := max(len(seeds_of(own)) for own in by_method(rows).values())) > 1:
        notes.append(
            f"Trained methods: mean of {count} trainings; tables/seeds says how far apart these lie."
        )
    for row in published:
        table.append({"method": row["method"], "source": "published", "ip": row["ip"], "pc": row["pc"]})
    for reference in dict.fromkeys(row["reference"] for row in published):
        names = ", ".join(row["method"] for row in published if row["reference"] == reference)
        notes.append(f"Published rows {names}: {reference}, on photographs, with other judges.")
    return Table(MAIN, table, tuple(notes))


def differences(rows: Rows, kind: str, metrics: Sequence[str] = ("ip", "pc")) -> Table:
    """Paired differences between all methods over the same requests: later method − earlier one."""
    methods, table = by_method(rows), []
    for metric in metrics:
        values = {method: per_request(own, metric) for method, own in methods.items()}
        for reference, method in combinations(values, 2):
            members = members_of(methods[method], methods[reference])
            paired = difference(values[method], values[reference], members)
            row = {
                "kind": kind,
                "metric": metric,
                "method": method,
                "minus": reference,
                "images": len(members),
            }
            table.append(row | limits("difference", paired))
    columns = (
        "kind",
        "metric",
        "method",
        "minus",
        "images",
        "difference",
        "difference_low",
        "difference_high",
    )
    return Table(columns, table)


def progress(rows: Rows, kind: str) -> Table:
    """How far IP gets from the prior (0) to the ceiling (1), with an interval; empty without these two."""
    columns = ("kind", "method", "way", "way_low", "way_high")
    methods = by_method(rows)
    values = {method: per_request(own, "ip") for method, own in methods.items()}
    if not {"prior", "ceiling"} <= set(values):
        return Table(columns, [])
    keys = sorted(values["prior"])
    span = [values["ceiling"][k] - values["prior"][k] for k in keys]
    table = []
    for method, own in values.items():
        if method not in ("prior", "ceiling"):
            gained = [own[k] - values["prior"][k] for k in keys]
            members = members_of(methods[method], methods["prior"], methods["ceiling"])
            table.append(
                {"kind": kind, "method": method}
                | limits("way", ratio(gained, span, [members[k] for k in keys]))
            )
    return Table(columns, table)


def details(rows: Rows, kind: str, group: str) -> Table:
    """Scores of each method by a column of samples, such as prompt_group."""
    table = []
    for method, own in by_method(rows).items():
        for value in sorted({row[group] for row in own}):
            part = [row for row in own if row[group] == value]
            scores = {
                k: v
                for m in ("ip", "ip_color", "pc", "face_size")
                for k, v in limits(m, mean_of(part, m)).items()
            }
            found = sum(row["found"] for row in part) / len(part)
            table.append(
                {"kind": kind, "method": method, group: value, "images": len(part), **scores, "found": found}
            )
    bounds = [f"{m}{side}" for m in ("ip", "ip_color", "pc", "face_size") for side in ("", "_low", "_high")]
    return Table(("kind", "method", group, "images", *bounds, "found"), table)


def kept_context(rows: Rows) -> Table:
    """PSNR, SSIM and LPIPS outside the subjects by method, and the paired differences between methods.

    A pair's value is the mean over the trainings that have one. Pairs without values are counted as left out,
    also where they are all that a method has.
    """
    table = []
    groups: dict[str, Rows] = {}
    for method, every in by_method(rows).items():
        own = [row for row in every if row["psnr"] is not None]
        members = {pair_of(r): r["members"] for r in own}
        left_out = len({pair_of(r) for r in every} - set(members))
        row = {"method": method, "minus": "", "pairs": len(members), "left_out": left_out}
        if own:
            groups[method] = own
            for metric in KEPT_METRICS:
                if any(r[metric] is None for r in own):
                    row |= {metric: NO_VALUE}
                else:
                    means = _by_pair(own, metric)
                    row |= limits(metric, interval(list(means.values()), [members[k] for k in means]))
        table.append(row)
    for reference, method in combinations(groups, 2):
        table.append(_context_difference(groups[method], groups[reference], method, reference))
    bounds = [f"{m}{side}" for m in KEPT_METRICS for side in ("", "_low", "_high")]
    notes = (
        "PSNR in dB, SSIM, LPIPS (measured where models.lpips names its weights), and the fraction of pixels "
        "compared, outside the dilated subjects of both images.",
        "Left out: pairs with an image in which nobody was found, or with too little outside the subjects.",
    )
    return Table(("method", "minus", "pairs", "left_out", *bounds), table, notes)


def _by_pair(rows: Rows, metric: str) -> dict[Any, float]:
    """The mean over trainings of each swap of `KEPT` rows."""
    values: dict[Any, list[float]] = {}
    for row in rows:
        values.setdefault(pair_of(row), []).append(row[metric])
    return {key: sum(v) / len(v) for key, v in values.items()}


def _context_difference(own: Rows, reference: Rows, method: str, minus: str) -> dict[str, Any]:
    """Difference over the swaps that both methods have a value for."""
    members = members_of(own, reference, key=pair_of)
    row: dict[str, Any] = {"method": method, "minus": minus}
    for metric in KEPT_METRICS:
        if any(r[metric] is None for r in (*own, *reference)):
            row |= {metric: NO_VALUE}
            continue
        mine, theirs = _by_pair(own, metric), _by_pair(reference, metric)
        both = sorted(set(mine) & set(theirs))
        if not both:
            continue
        paired = interval([mine[k] - theirs[k] for k in both], [members[k] for k in both])
        row |= {"pairs": len(both), **limits(metric, paired)}
    return row


# --- Beside published numbers -----------------------------------------------------------------------------

TABLE3 = (
    "method",
    "published_as",
    "optimization_free",
    *(
        f"{metric}{part}"
        for metric in METRICS
        for part in ("", "_low", "_high", "_published", "_difference", "_difference_low", "_difference_high")
    ),
)


def table3(rows: Rows, published: Rows) -> Table:
    """Every measured method beside its published numbers, and how far apart; then differences of two methods.

    A difference is measured less published, with the measured one's interval: a published number has none.

    Args:
        rows: samples of single subjects.
        published: rows of config/published.yaml; `ours` names the method that they are of.
    """
    methods = by_method(rows)
    measured = {
        metric: {method: mean_of(own, metric) for method, own in methods.items()} for metric in METRICS
    }
    table = []
    for method in methods:
        known = [row for row in published if row.get("ours") == method] or [{}]
        for row in known:
            values = {metric: (measured[metric][method], row.get(metric)) for metric in METRICS}
            table.append({"method": method} | _published_as(row) | _beside(values))
    for row in published:
        if row.get("ours") not in methods:
            values = {f"{metric}_published": row[metric] for metric in METRICS}
            table.append({"method": ""} | _published_as(row) | values)
    table += _published_differences(rows, published)
    notes = (
        "Measured less published, with 95 % intervals over subjects of what was measured; published numbers "
        "come without any. A − B: the paired difference of two methods, beside the published one.",
        "Published numbers are of CelebA's photographs. Where a run has other images and judges, a "
        "difference to them is of these, too, and says little of the method; that of two methods says more.",
    )
    return Table(TABLE3, table, notes)


def _published_as(row: Mapping[str, Any]) -> dict[str, Any]:
    """Cells of what a reference says of a method beside its numbers; none for an empty row."""
    if not row:
        return {}
    name = f"{row['method']}: {row['reference']}"
    return {"published_as": name, "optimization_free": row.get("optimization_free")}


def _beside(values: Mapping[str, tuple[Interval, float | None]]) -> dict[str, Any]:
    """Cells of what was measured, published, and the difference, by metric."""
    cells: dict[str, Any] = {}
    for metric, (own, known) in values.items():
        cells |= limits(metric, own) | {f"{metric}_published": known}
        if known is not None:
            apart = Interval(own.mean - known, own.low - known, own.high - known)
            cells |= limits(f"{metric}_difference", apart)
    return cells


def _published_differences(rows: Rows, published: Rows) -> list[dict[str, Any]]:
    """Paired differences of two methods that the same reference has numbers of, beside those."""
    methods, table = by_method(rows), []
    for one, other in combinations([row for row in published if row.get("ours") in methods], 2):
        if one["reference"] != other["reference"] or one["ours"] == other["ours"]:
            continue
        first, second = sorted((one, other), key=lambda row: list(methods).index(row["ours"]))
        values = {}
        for metric in METRICS:
            own, minus = (per_request(methods[row["ours"]], metric) for row in (first, second))
            members = members_of(methods[first["ours"]], methods[second["ours"]])
            values[metric] = difference(own, minus, members), first[metric] - second[metric]
        names = f"{first['method']} − {second['method']}: {first['reference']}"
        table.append(
            {"method": f"{first['ours']} − {second['ours']}", "published_as": names} | _beside(values)
        )
    return table


# --- The stage --------------------------------------------------------------------------------------------


def read_published(path: str | Path) -> list[Row]:
    """Rows of config/published.yaml. Raises ValueError naming the file and what is wrong or missing in it."""
    rows = read_list(path)
    for row in rows:
        missing = {"method", "ip", "pc", "reference"} - set(row)
        if missing:
            raise DataError(f"{path}: row {row} lacks {', '.join(sorted(missing))}")
    return rows


def tables(
    sample_files: Sequence[str | Path],
    kept: str | Path,
    published: str | Path,
    output: str | Path,
    split: str = "test",
) -> None:
    """Write the quality tables into folder `output`: those of the kinds of images that there are.

    main.{csv,md,tex} and table3.{csv,md,tex}, with the published numbers, of single subjects,
    multi.{csv,md,tex} of two, context.{csv,md,tex} of swaps; seeds.{csv,md,tex} if a method was trained with
    several; differences.csv, progress.csv and groups.csv of single subjects and of two.

    Args:
        sample_files: scored rows.
        kept: the parquet file of `moa.evaluation.swaps.compare_swaps`.
        published: config/published.yaml.
        split: which samples to use.

    Raises:
        DataError: no samples of that split, or a broken file.
    """
    rows = [row for row in samples.read(sample_files) if row["split"] == split]
    if not rows:
        raise DataError(f"no samples of split {split}: generate and score its images first")
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("single", "multi")}
    present = {kind: part for kind, part in kinds.items() if part}
    made: dict[str, Table] = {}
    if "single" in present:
        made["main"] = quality(present["single"], read_published(published))
        made["table3"] = table3(present["single"], read_published(published))
    if "multi" in present:
        made["multi"] = quality(present["multi"])
    swaps = [row for row in read_rows(kept, KEPT) if (row["split"], row["kind"]) == (split, "swap")]
    if swaps or any(row["kind"] == "swap" for row in rows):
        made["context"] = kept_context(swaps)
    spread = [trainings(part, kind) for kind, part in present.items()] + [trainings_of_swaps(swaps)]
    if any(len(seeds_of(own)) > 1 for part in (*present.values(), swaps) for own in by_method(part).values()):
        made["seeds"] = joined(spread)
    for name, table in made.items():
        for form in FORMS:
            save(table, Path(output) / f"{name}{form}")
    if present:
        save_details(present, Path(output))


def save_details(present: Mapping[str, Rows], output: Path) -> None:
    """Write the tables that go further than the means, of samples by kind."""
    save(joined(differences(part, kind) for kind, part in present.items()), output / "differences.csv")
    save(joined(progress(part, kind) for kind, part in present.items()), output / "progress.csv")
    groups = (details(part, kind, "prompt_group") for kind, part in present.items())
    save(joined(groups), output / "groups.csv")
