"""The `tuning-table` stage: what each trial of the tuning grid scored on the validation subjects."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from moa.data.records import read_rows
from moa.evaluation import samples
from moa.evaluation.groups import mean_of
from moa.evaluation.samples import KEPT
from moa.evaluation.table import Table, limits, save

METRICS = tuple(f"{metric}{side}" for metric in ("ip", "pc") for side in ("", "_low", "_high"))
COLUMNS = ("method", "trial", "changes", "images", *METRICS, "found", "score", "swaps", "psnr")


def tabulate(trials: Sequence[str], changes: str, output: Path) -> None:
    """Write tuning.csv, a row a trial, with its changes to the configuration.

    IP, PC, found and score are of single subjects. The score is what trials are chosen by: the geometric
    mean of IP and PC, so that a per cent of the one weighs as much as a per cent of the other. PSNR outside
    the subject when it is swapped (dB, mean over `swaps` pairs) is shown beside it.

    Args:
        trials: `method/trial=folder` with samples.parquet and kept.parquet, of validation subjects only.
        changes: JSON, {method: {trial: changed settings}}.
        output: the CSV.

    Raises:
        DataError: a file is missing or broken.
        ValueError: samples of another split than validation are among them.
    """
    settings = json.loads(changes)
    rows = []
    for entry in trials:
        name, _, folder = entry.partition("=")
        method, trial = name.split("/")
        changed = json.dumps(settings[method][trial], sort_keys=True)
        rows.append({"method": method, "trial": trial, "changes": changed} | measured(Path(folder)))
    save(Table(COLUMNS, rows), output)


def measured(folder: Path) -> dict[str, float | None]:
    """What a trial's images scored."""
    rows = samples.read(folder / "samples.parquet", samples.SAMPLE)
    if any(row["split"] != "validation" for row in rows):
        raise ValueError(f"{folder} holds test samples: choices are made on validation subjects only")
    single = [row for row in rows if row["kind"] == "single"]
    scores = limits("ip", mean_of(single, "ip")) | limits("pc", mean_of(single, "pc"))
    kept = [row["psnr"] for row in read_rows([folder / "kept.parquet"], KEPT) if row["psnr"] is not None]
    return {
        "images": len(single),
        **scores,
        "found": sum(row["found"] for row in single) / len(single),
        "score": math.sqrt(max(scores["ip"], 0.0) * max(scores["pc"], 0.0)),
        "swaps": len(kept),
        "psnr": sum(kept) / len(kept) if kept else None,
    }
