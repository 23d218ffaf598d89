"""The `tables` stage: samples to CSV, Markdown and LaTeX. No image is opened and no model runs here.

Quality tables hold nothing that changes from run to run (times and memory have a table of their own), so the
same samples give the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from moa.config import read_list
from moa.data.errors import DataError
from moa.data.records import read_rows
from moa.evaluation import samples
from moa.evaluation.samples import KEPT, Row
from moa.evaluation.statistics import Interval, difference, interval, ratio
from moa.files import write_atomically
from moa.trained import TRAINED

ORDER = ("prior", "moa", "moa_wrong_subject", "fastcomposer", "ceiling")  # others follow by name
MAIN = ("method", "source", "images", "ip", "ip_low", "ip_high", "pc", "pc_low", "pc_high", "found")
KEPT_METRICS = ("psnr", "ssim", "lpips", "outside")
NO_VALUE = "not measured"
Cells = Mapping[str, Any]  # values by column
Rows = Sequence[Cells]


@dataclass(frozen=True)
class Table:
    """Named columns and their rows; None and NaN are empty cells."""

    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    notes: tuple[str, ...] = ()  # below the Markdown and LaTeX forms


# --- Forms ------------------------------------------------------------------------------------------------


def cell(value: Any) -> str:
    """A value as text: four decimals for floats, nothing for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def to_csv(table: Table) -> str:
    """RFC 4180 but for line ends, which are those of Unix."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([cell(row.get(name)) for name in table.columns] for row in table.rows)
    return text.getvalue()


def _pretty(table: Table) -> tuple[list[str], list[list[str]]]:
    """Columns and cells for reading: three decimals, `x_low` and `x_high` folded into x as [low, high]."""
    folded = [c for c in table.columns if {f"{c}_low", f"{c}_high"} <= set(table.columns)]
    hidden = {f"{name}_{side}" for name in folded for side in ("low", "high")}
    shown = [name for name in table.columns if name not in hidden]

    def text(row: Mapping[str, Any], name: str) -> str:
        value = row.get(name)
        plain = f"{value:.3f}" if isinstance(value, float) and not math.isnan(value) else cell(value)
        low, high = (row.get(f"{name}_{side}") if name in folded else None for side in ("low", "high"))
        return plain if not cell(low) or not cell(high) else f"{plain} [{low:.3f}, {high:.3f}]"

    return shown, [[text(row, name) for name in shown] for row in table.rows]


def to_markdown(table: Table) -> str:
    """A pipe table, intervals in brackets, notes below."""
    names, rows = _pretty(table)
    lines = [f"| {' | '.join(r)} |" for r in (names, ["---"] * len(names), *rows)]
    return "\n".join([*lines, *(f"\n{note}" for note in table.notes)]) + "\n"


def to_latex(table: Table) -> str:
    """A booktabs tabular, intervals in brackets, notes as comments."""
    names, rows = _pretty(table)
    body = [" & ".join(map(_escape, r)) + r" \\" for r in rows]
    head = " & ".join(map(_escape, names)) + r" \\"
    layout = "l" * len(names)
    lines = [rf"\begin{{tabular}}{{{layout}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}", *(f"% {note}" for note in table.notes)]) + "\n"


_MATHS = {"<": "$<$", ">": "$>$", "−": "$-$", "≠": r"$\neq$", "±": r"$\pm$"}


def _escape(text: str) -> str:
    return "".join(f"\\{c}" if c in "&%$#_{}" else _MATHS.get(c, c) for c in text)


FORMS: dict[str, Callable[[Table], str]] = {".csv": to_csv, ".md": to_markdown, ".tex": to_latex}


def save(table: Table, path: str | Path) -> None:
    """Write a table; the ending, .csv, .md or .tex, says in which form."""
    path = Path(path)
    text = FORMS[path.suffix](table)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


# --- From samples -----------------------------------------------------------------------------------------


def by_method(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of each method, the methods in the order of the tables."""
    names = sorted(
        {row["method"] for row in rows}, key=lambda m: (ORDER.index(m) if m in ORDER else len(ORDER), m)
    )
    return {name: [row for row in rows if row["method"] == name] for name in names}


def limits(name: str, value: Interval) -> dict[str, float]:
    """An interval as the cells `name`, `name_low` and `name_high`."""
    return {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}


def mean_of(rows: Rows, metric: str) -> Interval:
    """Mean over images of a column of samples, with its interval over subjects."""
    return interval([row[metric] for row in rows], [row["members"] for row in rows])


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
    if (count := max(len(_seeds(own)) for own in by_method(rows).values())) > 1:
        notes.append(
            f"Trained methods: mean of {count} trainings; tables/seeds says how far apart these lie."
        )
    for row in published:
        table.append({"method": row["method"], "source": "published", "ip": row["ip"], "pc": row["pc"]})
    for reference in dict.fromkeys(row["reference"] for row in published):
        names = ", ".join(row["method"] for row in published if row["reference"] == reference)
        notes.append(f"Published rows {names}: {reference}, on photographs, with other judges.")
    return Table(MAIN, table, tuple(notes))


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["subject"], row["prompt_id"], row["index"]


def _members(
    *methods: Rows, key: Callable[[Mapping[str, Any]], tuple[Any, ...]] = _key
) -> dict[tuple[Any, ...], list[str]]:
    """On whose looks the rows of each request (or pair) depend, of all these methods."""
    members: dict[tuple[Any, ...], set[str]] = {}
    for row in (row for rows in methods for row in rows):
        members.setdefault(key(row), set()).update(row["members"])
    return {key: sorted(names) for key, names in members.items()}


def _per_request(rows: Rows, metric: str) -> dict[tuple[Any, ...], float]:
    """A metric by request, averaged over training seeds, so that methods can be paired."""
    values: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        values.setdefault(_key(row), []).append(row[metric])
    return {key: sum(v) / len(v) for key, v in values.items()}


def differences(rows: Rows, kind: str, metrics: Sequence[str] = ("ip", "pc")) -> Table:
    """Paired differences between all methods over the same requests: later method − earlier one."""
    methods, table = by_method(rows), []
    for metric in metrics:
        values = {method: _per_request(own, metric) for method, own in methods.items()}
        for reference, method in combinations(values, 2):
            members = _members(methods[method], methods[reference])
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
    values = {method: _per_request(own, "ip") for method, own in methods.items()}
    if not {"prior", "ceiling"} <= set(values):
        return Table(columns, [])
    keys = sorted(values["prior"])
    span = [values["ceiling"][k] - values["prior"][k] for k in keys]
    table = []
    for method, own in values.items():
        if method not in ("prior", "ceiling"):
            gained = [own[k] - values["prior"][k] for k in keys]
            members = _members(methods[method], methods["prior"], methods["ceiling"])
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

    Pairs without values are counted as left out, also where they are all that a method has.
    """
    table = []
    groups: dict[str, Rows] = {}
    for method, every in by_method(rows).items():
        own = [row for row in every if row["psnr"] is not None]
        row = {"method": method, "minus": "", "pairs": len(own), "left_out": len(every) - len(own)}
        if own:
            groups[method] = own
            members = [r["members"] for r in own]
            for metric in KEPT_METRICS:
                values = [r[metric] for r in own]
                row |= limits(metric, interval(values, members)) if None not in values else {metric: NO_VALUE}
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


def _pair(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["subject"], row["other"], row["prompt_id"], row["index"]


def _context_difference(own: Rows, reference: Rows, method: str, minus: str) -> dict[str, Any]:
    """Difference over the swaps that both methods have a value for."""

    def keyed(rows: Rows, metric: str) -> dict[Any, float]:
        values: dict[Any, list[float]] = {}
        for r in rows:
            values.setdefault(_pair(r), []).append(r[metric])
        return {key: sum(v) / len(v) for key, v in values.items()}

    members = _members(own, reference, key=_pair)
    row: dict[str, Any] = {"method": method, "minus": minus}
    for metric in KEPT_METRICS:
        if any(r[metric] is None for r in (*own, *reference)):
            row |= {metric: NO_VALUE}
            continue
        mine, theirs = keyed(own, metric), keyed(reference, metric)
        both = sorted(set(mine) & set(theirs))
        if not both:
            continue
        paired = interval([mine[k] - theirs[k] for k in both], [members[k] for k in both])
        row |= {"pairs": len(both), **limits(metric, paired)}
    return row


# --- Beside published numbers -----------------------------------------------------------------------------

METRICS = ("ip", "pc")
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
            own, minus = (_per_request(methods[row["ours"]], metric) for row in (first, second))
            members = _members(methods[first["ours"]], methods[second["ours"]])
            values[metric] = difference(own, minus, members), first[metric] - second[metric]
        names = f"{first['method']} − {second['method']}: {first['reference']}"
        table.append(
            {"method": f"{first['ours']} − {second['ours']}", "published_as": names} | _beside(values)
        )
    return table


# --- Several trainings ------------------------------------------------------------------------------------

SEEDS = (
    "kind",
    "metric",
    "method",
    "minus",
    "trainings",
    "value",
    "value_low",
    "value_high",
    "least",
    "most",
    "sd",
)


def trainings(rows: Rows, kind: str) -> Table:
    """How far trainings with different seeds lie apart: each method's mean, and each difference of two.

    value has the interval over subjects, as everywhere; least, most and sd are over the trainings' means, of
    a difference over all choices of a training of either, with the root of the two variances' sum as sd. Two
    methods that use the same weights are compared training by training.
    """
    methods = by_method(rows)
    table: list[dict[str, Any]] = []
    for metric in METRICS:
        means = {method: _means_of_trainings(own, metric) for method, own in methods.items()}
        for method in methods:
            if len(means[method]) > 1:
                row = {"kind": kind, "metric": metric, "method": method, "trainings": len(means[method])}
                spread = _spread(list(means[method].values()))
                table.append(row | limits("value", mean_of(methods[method], metric)) | spread)
        for reference, method in combinations(methods, 2):
            if max(len(means[method]), len(means[reference])) > 1:
                own, other = (_per_request(methods[name], metric) for name in (method, reference))
                row = {"kind": kind, "metric": metric, "method": method, "minus": reference}
                members = _members(methods[method], methods[reference])
                value = limits("value", difference(own, other, members))
                table.append(row | value | _spread_apart(means, method, reference))
    notes = (
        "value: mean over images, with its 95 % interval over subjects. least, most: of the means of "
        "trainings that differ in their seed alone; of a difference, of all choices of one of either method, "
        "or of each training of two methods that share theirs. sd: their standard deviation.",
    )
    return Table(SEEDS, table, notes)


def trainings_of_swaps(rows: Rows) -> Table:
    """Likewise of the context kept under a swap, from `KEPT` rows: pairs with a value in every training."""
    table: list[dict[str, Any]] = []
    for metric in ("psnr", "ssim"):
        for method, own in by_method(rows).items():
            seeds = _seeds(own)
            pairs: dict[tuple[Any, ...], dict[int | None, float]] = {}
            for row in own:
                if row[metric] is not None:
                    pairs.setdefault(_pair(row), {})[row["train_seed"]] = row[metric]
            whole = {pair: found for pair, found in pairs.items() if found.keys() == seeds}
            if len(seeds) > 1 and whole:
                members = {_pair(row): row["members"] for row in own}
                value = interval(
                    [statistics.mean(found.values()) for found in whole.values()],
                    [members[pair] for pair in whole],
                )
                means = [statistics.mean(found[seed] for found in whole.values()) for seed in seeds]
                about = {"kind": "swap", "metric": f"swap_{metric}", "method": method}
                table.append(about | {"trainings": len(seeds)} | limits("value", value) | _spread(means))
    return Table(SEEDS, table)


def _seeds(rows: Rows) -> set[int | None]:
    return {row["train_seed"] for row in rows}


def _means_of_trainings(rows: Rows, metric: str) -> dict[int | None, float]:
    """The mean of each training by its seed; of one that was not trained, its only one."""
    groups: dict[int | None, list[float]] = {}
    for row in sorted(rows, key=lambda row: -1 if row["train_seed"] is None else row["train_seed"]):
        groups.setdefault(row["train_seed"], []).append(row[metric])
    return {seed: sum(values) / len(values) for seed, values in groups.items()}


def _spread_apart(means: Mapping[str, Mapping[int | None, float]], method: str, minus: str) -> dict[str, Any]:
    """trainings, least, most and sd of the differences of two methods."""
    own, other = means[method], means[minus]
    if TRAINED.get(method, method) == TRAINED.get(minus, minus) and own.keys() == other.keys():
        paired = [own[seed] - other[seed] for seed in own]
        return {"trainings": len(paired)} | _spread(paired)
    values = list(own.values()), list(other.values())
    return {"trainings": len(own) * len(other)} | _spread(*values)


def _spread(means: Sequence[float], minus: Sequence[float] = (0.0,)) -> dict[str, float]:
    """least, most and sd of the differences of two methods' trainings."""
    every = [one - other for one in means for other in minus]
    variances = [statistics.variance(part) for part in (means, minus) if len(part) > 1]
    return {"least": min(every), "most": max(every), "sd": math.sqrt(sum(variances))}


# --- Costs ------------------------------------------------------------------------------------------------

COST = (
    "method",
    "images",
    "seconds_per_image",
    "peak_mb",
    "peak_gpu_mb",
    "trained_parameters",
    "train_seconds",
    "train_peak_mb",
    "train_peak_gpu_mb",
)


def cost(rows: Rows, training: Mapping[str, Cells], memory: Mapping[str, Cells]) -> Table:
    """What methods cost on this machine; docs/workflow.md says what its columns mean.

    Args:
        rows: samples.
        training: for methods with training, `training_cost`, of several trainings their `mean_training`.
        memory: `generation_memory` by method, of several the `largest`.
    """
    table = []
    for method, own in by_method(rows).items():
        spent = {"images": len(own), "seconds_per_image": sum(r["seconds"] for r in own) / len(own)}
        table.append({"method": method, **spent, **memory.get(method, {}), **training.get(method, {})})
    return Table(COST, table)


def training_cost(path: str | Path) -> dict[str, Any]:
    """Cells of the cost table from a training's train.json. Raises DataError naming a broken one."""
    try:
        about = json.loads(Path(path).read_text(encoding="utf-8"))
        return {
            "trained_parameters": about["trained_parameters"],
            "train_seconds": float(about["seconds"]),
            "train_peak_mb": megabytes(about["peak_memory_bytes"]),
            "train_peak_gpu_mb": megabytes(about["peak_gpu_bytes"]),
        }
    except (json.JSONDecodeError, KeyError) as error:
        raise DataError(f"{path} is no train.json ({error}); train again") from error


def mean_training(costs: Sequence[Cells]) -> dict[str, Any]:
    """One training's cost from that of several which differ in their seed: mean seconds, largest peaks."""
    peaks = largest(costs, "train_peak_mb", "train_peak_gpu_mb")
    return dict(costs[0]) | {"train_seconds": sum(one["train_seconds"] for one in costs) / len(costs)} | peaks


def megabytes(size: int) -> float | None:
    """Bytes in MB; None for 0, as of a GPU that was not used."""
    return size / 2**20 or None


def largest(cells: Sequence[Cells], *names: str) -> dict[str, float | None]:
    """The largest of each of these cells; None where all are empty."""
    return {name: max((one[name] for one in cells if one[name]), default=None) for name in names}


def generation_memory(path: str | Path) -> dict[str, float | None]:
    """Cells of the cost table from what generation wrote. Raises DataError naming a broken file."""
    try:
        about = json.loads(Path(path).read_text(encoding="utf-8"))
        return {
            "peak_mb": megabytes(about["peak_memory_bytes"]),
            "peak_gpu_mb": megabytes(about["peak_gpu_bytes"]),
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no peaks of memory ({error!r}); generate again") from error


def costs(
    sample_files: Sequence[str | Path],
    output: str | Path,
    training: Sequence[str] = (),
    memory: Sequence[str] = (),
) -> None:
    """Write cost.csv, .md and .tex, apart from the quality tables because they differ from run to run.

    Args:
        sample_files: scored rows.
        output: one of the files to write; the others lie beside it.
        training: method=path of each train.json; of several, the mean counts.
        memory: method=path of what `generate-shard --memory` wrote; of several, the largest counts.
    """
    trained: dict[str, list[Cells]] = {}
    for method, path in map(_named_path, training):
        trained.setdefault(method, []).append(training_cost(path))
    peaks: dict[str, list[Cells]] = {}
    for method, path in map(_named_path, memory):
        peaks.setdefault(method, []).append(generation_memory(path))
    table = cost(
        samples.read(sample_files),
        {method: mean_training(every) for method, every in trained.items()},
        {method: largest(every, "peak_mb", "peak_gpu_mb") for method, every in peaks.items()},
    )
    for form in FORMS:
        save(table, Path(output).with_suffix(form))


def _named_path(argument: str) -> tuple[str, str]:
    method, _, path = argument.partition("=")
    if not method or not path:
        raise ValueError(f"{argument!r} must be method=path")
    return method, path


# --- The stage --------------------------------------------------------------------------------------------


def read_published(path: str | Path) -> list[Row]:
    """Rows of config/published.yaml. Raises ValueError naming the file and what is wrong or missing in it."""
    rows = read_list(path)
    for row in rows:
        missing = {"method", "ip", "pc", "reference"} - set(row)
        if missing:
            raise DataError(f"{path}: row {row} lacks {', '.join(sorted(missing))}")
    return rows


def joined(parts: Iterable[Table]) -> Table:
    """Tables of the same columns, one below the other."""
    tables = list(parts)
    return Table(tables[0].columns, [row for table in tables for row in table.rows], tables[0].notes)


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
        kept: the parquet file of `moa.evaluation.score.compare_swaps`.
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
    if any(len(_seeds(own)) > 1 for part in (*present.values(), swaps) for own in by_method(part).values()):
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
