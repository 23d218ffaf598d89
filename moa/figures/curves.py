"""Training curves from log.csv, and scores with their intervals from the tables."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moa.data.errors import DataError
from moa.figures.layout import save_plot, style

LOSSES = {
    "loss_masked": "denoising, masked",
    "loss_router": "router",
    "loss_object": "object (localization)",
}
TITLES = {
    "prior": "prior",
    "moa": "MoA",
    "moa_wrong_subject": "MoA, wrong\nsubject",
    "fastcomposer": "FastComposer",
    "textual_inversion": "Textual\nInversion",
    "ceiling": "ceiling",
}
COLORS = {
    "prior": "#8c8c8c",
    "moa": "#1f5fa8",
    "moa_wrong_subject": "#9dbbdc",
    "fastcomposer": "#d9822b",
    "textual_inversion": "#8a5fb0",
    "ceiling": "#3c8d5a",
}


def read_columns(path: str | Path, needed: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of a CSV of numbers; empty cells are NaN. Raises DataError naming file and missing column."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        missing = [name for name in needed if not rows or name not in rows[0]]
        if missing:
            raise DataError(f"{path} lacks the column {', '.join(missing)} or has no rows; make it again")
        return {
            name: np.array([float("nan" if row[name] == "" else row[name]) for row in rows])
            for name in rows[0]
        }
    except (ValueError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is cut short or holds no number somewhere ({error}); make it again"
        ) from error


@style()
def training(logs: Sequence[str | Path], output: str | Path) -> None:
    """Draw the losses of each training against its steps.

    Args:
        logs: log.csv files, each in a folder called like its method.
        output: PNG file.
    """
    curves = {Path(path).parent.name: read_columns(path, ("step", "loss")) for path in logs}
    figure = Figure(figsize=(3.4 * len(LOSSES), 3.0), layout="constrained")
    drawn: dict[str, Any] = {}
    axes = figure.subplots(1, len(LOSSES))
    for axis, (name, title) in zip(axes, LOSSES.items(), strict=True):
        for method, values in curves.items():
            if name in values and np.isfinite(values[name]).any() and np.any(values[name] != 0):
                label = TITLES.get(method, method).replace("\n", " ")
                (drawn[label],) = axis.plot(
                    values["step"], values[name], color=COLORS.get(method), linewidth=1.4
                )
        axis.set(title=title, xlabel="step")
    below: Any = {"loc": "outside lower center", "ncols": max(1, len(drawn)), "fontsize": 8}
    figure.legend(drawn.values(), drawn.keys(), **below)
    save_plot(figure, output)


@style()
def scores(table: str | Path, output: str | Path) -> None:
    """Draw IP and PC of a quality table's measured rows, with their 95 % intervals over subjects.

    Args:
        table: main.csv of the `tables` stage.
        output: PNG file.
    """
    with open(table, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("source") == "measured"]
    if not rows:
        raise DataError(f"{table} has no measured rows; make it again")
    figure = Figure(figsize=(2.2 + 1.25 * len(rows), 3), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, metric, title in zip(axes, ("ip", "pc"), ("identity (IP)", "prompt (PC)"), strict=True):
        _bars(axis, rows, metric)
        axis.set(title=title)
        axis.grid(axis="x", visible=False)
    figure.supxlabel("mean over images; 95 % intervals over subjects", fontsize=8)
    save_plot(figure, output)


def _bars(axis: Any, rows: Sequence[Mapping[str, str]], metric: str) -> None:
    """A bar with its interval for each row; a row without interval has none."""
    values = [float(row[metric]) for row in rows]
    low, high = ([float(row[f"{metric}_{side}"] or "nan") for row in rows] for side in ("low", "high"))
    errors = [
        [v - a for v, a in zip(values, low, strict=True)],
        [b - v for v, b in zip(values, high, strict=True)],
    ]
    known = not any(math.isnan(e) for side in errors for e in side)
    colors = [COLORS.get(row["method"], "#777777") for row in rows]
    labels = [TITLES.get(row["method"], row["method"]) for row in rows]
    axis.bar(range(len(rows)), values, color=colors, yerr=errors if known else None, capsize=3)
    axis.set_xticks(range(len(rows)), labels, fontsize=7)


@style()
def sparse(table: str | Path, output: str | Path) -> None:
    """Draw what sparse experts change and save against their threshold τ.

    Args:
        table: CSV of `moa.evaluation.sparse`; its row with τ = 0 is the dense run.
        output: PNG file.
    """
    columns = read_columns(table, ("threshold", "psnr", "ip", "ip_low", "ip_high", "active", "time_ratio"))
    dense, rest = columns["threshold"] == 0, columns["threshold"] > 0
    if not dense.any() or not rest.any():
        raise DataError(f"{table} lacks the dense run or a threshold; make it again")
    tau = columns["threshold"][rest]
    figure = Figure(figsize=(10.2, 2.8), layout="constrained")
    alike, identity, saved = figure.subplots(1, 3)
    alike.plot(tau, columns["psnr"][rest], marker="o", color=COLORS["moa"])
    alike.axhline(40, color="#777777", linestyle=":")
    alike.set(title="PSNR to the dense images, dB")
    low, high = columns["ip_low"][dense][0], columns["ip_high"][dense][0]
    identity.axhspan(low, high, color=COLORS["moa_wrong_subject"], alpha=0.35, label="dense, 95 %")
    identity.plot(tau, columns["ip"][rest], marker="o", color=COLORS["moa"], label="sparse")
    identity.set(title="identity (IP)")
    for name, label, color in (
        ("time_ratio", "time, dense = 1", COLORS["moa"]),
        ("active", "pixels left to the expert", COLORS["fastcomposer"]),
    ):
        saved.plot(tau, columns[name][rest], marker="o", color=color, label=label)
    saved.set(title="cost")
    for axis in (alike, identity, saved):
        axis.set(xlabel="threshold τ", xscale="log")
    identity.legend(fontsize=8)
    saved.legend(fontsize=8)
    save_plot(figure, output)
