"""The `tuning-table` stage: what each trial of the tuning grid scored on the validation subjects."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from moa.evaluation import samples
from moa.evaluation.tables import Table, limits, mean_of, save

BOUNDS = tuple(f"{metric}{side}" for metric in ("ip", "pc") for side in ("", "_low", "_high"))


def tabulate(trials: Sequence[str], changes: str, output: Path) -> None:
    """Write tuning.csv, a row a trial: method, trial, its changes to the configuration, IP, PC, found, score.

    The score is what trials are chosen by: the geometric mean of IP and PC, so that a per cent of the one
    weighs as much as a per cent of the other.

    Args:
        trials: `method/trial=file of scored samples`, validation subjects only.
        changes: JSON, {method: {trial: changed settings}}.
        output: the CSV.

    Raises:
        DataError: a samples file is missing or broken.
        ValueError: samples of another split than validation are among them.
    """
    settings = json.loads(changes)
    rows = []
    for entry in trials:
        name, _, path = entry.partition("=")
        method, trial = name.split("/")
        own = samples.read(path, samples.SAMPLE)
        if any(row["split"] != "validation" for row in own):
            raise ValueError(f"{path} holds test samples: choices are made on validation subjects only")
        found = sum(row["found"] for row in own) / len(own)
        scores = limits("ip", mean_of(own, "ip")) | limits("pc", mean_of(own, "pc"))
        changed = json.dumps(settings[method][trial], sort_keys=True)
        rows.append(
            {
                "method": method,
                "trial": trial,
                "changes": changed,
                "images": len(own),
                **scores,
                "found": found,
                "score": math.sqrt(max(scores["ip"], 0.0) * max(scores["pc"], 0.0)),
            }
        )
    save(Table(("method", "trial", "changes", "images", *BOUNDS, "found", "score"), rows), output)
