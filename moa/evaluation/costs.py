"""The `cost` stage: what methods cost, apart from the quality tables because it differs from run to run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moa.data.errors import DataError
from moa.evaluation import samples
from moa.evaluation.groups import Cells, Rows, by_method
from moa.evaluation.table import FORMS, Table, save

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
