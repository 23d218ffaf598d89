"""The `ablation-table` stage: what the parts of a method are worth, on validation subjects.

An ablation is the method with something changed or left out, beside the method as it is, the reference: the
same requests, hence the same noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moa.data.records import write_rows
from moa.evaluation.measures import MEASURE, Measures, trial_measures
from moa.evaluation.samples import Row
from moa.evaluation.statistics import Interval
from moa.evaluation.table import FORMS, Table, limits, save
from moa.trials import reference

Changes = Mapping[str, Mapping[str, Mapping[str, Any]]]  # method: ablation: what it changes
SHOWN = {
    "ip": ("single", "ip"),
    "pc": ("single", "pc"),
    "multi_ip": ("multi", "ip"),
    "multi_pc": ("multi", "pc"),
    "prior_ssim": ("single", "prior_ssim"),
    "seed_ssim": ("single", "seed_ssim"),
    "swap_psnr": ("swap", "swap_psnr"),
}  # columns: kind and measure
NOTES = (
    "Validation subjects; 95 % intervals over subjects. Differences are paired, to the method as it is, the "
    "first row.",
    "One training each: what another seed would give is not in the intervals. Ablations that do not train "
    "share the reference's.",
)


def name_of(method: str, ablation: str) -> str:
    """What an ablation is called among the measures, and in config/claims.yaml."""
    return f"{method}:{ablation}"


def gather(trials: Sequence[str]) -> list[Row]:
    """Measures of all trials, each under its `name_of`.

    Args:
        trials: `method/ablation=folder`.

    Raises:
        DataError: a file is missing or broken.
        ValueError: images of another split than validation.
    """
    rows = []
    for entry in trials:
        name, _, folder = entry.partition("=")
        measured = trial_measures(Path(folder))
        if any(row["split"] != "validation" for row in measured):
            raise ValueError(f"{folder} holds test samples: choices are made on validation subjects only")
        rows += [row | {"method": name_of(*name.split("/"))} for row in measured]
    return rows


def table(measures: Measures, changes: Changes) -> Table:
    """A row an ablation: the measures of `SHOWN` with their differences to the reference."""
    rows = []
    for method, ablations in changes.items():
        first = reference(method, ablations)
        for name in sorted(ablations, key=lambda other: other != first):  # the others in their order
            about: dict[str, Any] = {"method": method, "ablation": name, "changes": describe(ablations[name])}
            about["trained"] = bool(ablations[name].get("train") or ablations[name].get("models"))
            about["images"] = len(measures.get("single", "ip", name_of(method, name)))
            rows.append(about | cells(measures, name_of(method, name), name_of(method, first)))
    shown = [column for column in SHOWN if any(column in row for row in rows)]
    bounds = [
        f"{c}{end}{side}" for c in shown for end in ("", "_difference") for side in ("", "_low", "_high")
    ]
    return Table(("method", "ablation", "changes", "trained", "images", *bounds), rows, NOTES)


def cells(measures: Measures, method: str, first: str) -> dict[str, float]:
    """The measures of an ablation, and the differences to the reference unless it is that itself."""
    found: dict[str, float] = {}
    for column, (kind, metric) in SHOWN.items():
        own, other = (measures.get(kind, metric, name) for name in (method, first))
        if own:
            found |= limits(column, own.mean())
        if method != first and own.common(other):
            found |= limits(f"{column}_difference", difference(own.minus(other)))
    return found


def difference(value: Interval) -> Interval:
    """A difference without a negative zero, which equal images would give."""
    return Interval(value.mean + 0.0, value.low + 0.0, value.high + 0.0)


def describe(changed: Mapping[str, Any]) -> str:
    """What an ablation changes, such as "train.router=none"."""
    return "; ".join(
        f"{section}.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for section, values in changed.items()
        for key, value in values.items()
    )


def tabulate(trials: Sequence[str], changes: str, measures: str | Path, output: str | Path) -> None:
    """Write ablations.{csv,md,tex} into folder `output`, and what they are made of.

    Args:
        trials: `method/ablation=folder` with samples, kept and preserved, of validation subjects only.
        changes: JSON, {method: {ablation: changed settings}}.
        measures: parquet file of `MEASURE` rows to write, which the ledger of claims reads.
        output: folder.

    Raises:
        DataError: a file is missing or broken.
        ValueError: images of another split than validation, or no ablation that changes nothing.
    """
    rows = gather(trials)
    made = table(Measures(rows), json.loads(changes))
    write_rows(
        measures,
        sorted(rows, key=lambda row: (row["method"], row["metric"], row["kind"], row["unit"])),
        MEASURE,
    )
    for form in FORMS:
        save(made, Path(output) / f"ablations{form}")
