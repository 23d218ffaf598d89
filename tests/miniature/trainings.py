"""What the tests of the miniature's trainings look at."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


def weights(folder: Path) -> Tensors:
    """The tensors of every safetensors file in a folder."""
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def copied(model: torch.nn.Module) -> Tensors:
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log(folder: Path) -> list[dict[str, str]]:
    """The rows of log.csv but for the time they took."""
    with (folder / "log.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
