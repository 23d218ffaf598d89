"""Two processes (gloo) come to what one does with the same global batch, also when they are interrupted."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moa.sampling import load_prior
from moa.training import fastcomposer, loop, moa
from moa.training.dataset import Records
from moa.training.trainee import FrozenPrior
from tests.training import tiny

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TRAINEES = {"moa": moa, "fastcomposer": fastcomposer}
# Many samples lose their subjects, so that the two halves of a batch have different numbers of them.
UNEVEN = {"steps": 5, "log_every": 1, "p_drop": 0.5, "checkpoint_every": 2, "object_weight": 1.0, "ema": 0.5}


def log(folder: Path) -> list[dict[str, float]]:
    """Rows of log.csv without the time."""
    with (folder / "log.csv").open() as file:
        return [{k: float(v) for k, v in r.items() if k != "seconds"} for r in csv.DictReader(file)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def execute(*command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def one(models, shards, subjects, tmp_path_factory):
    """Results of unbroken trainings on one process."""
    folder = tmp_path_factory.mktemp("one")
    for name, trainer in TRAINEES.items():
        trainer.run(tiny.config(models, **UNEVEN), shards, subjects, folder / name)
    return folder


@pytest.fixture(scope="module")
def launched(models, shards, subjects, tmp_path_factory):
    """MoA, trained on two processes by Accelerate's launcher."""
    output = tmp_path_factory.mktemp("launched") / "moa"
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0"
    settings = json.dumps(asdict(tiny.config(models, **UNEVEN)))
    execute(
        *launch.split(), "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "moa", "train",
        "--config", settings, "--records", *map(str, shards), "--subjects", str(subjects),
        "--output", str(output),
    )  # fmt: skip
    return output


@pytest.fixture(scope="module")
def forked(models, shards, subjects, tmp_path_factory):
    """FastComposer in two parts a process; MoA, stopped after step 3, left so or started again."""
    folder = tmp_path_factory.mktemp("forked")
    split = asdict(tiny.config(models, **UNEVEN, accumulation=2))
    common = {
        "config": asdict(tiny.config(models, **UNEVEN)),
        "records": [str(s) for s in shards],
        "subjects": str(subjects),
    }
    runs = [
        {"name": "fastcomposer", "config": split, "output": str(folder / "whole" / "fastcomposer")},
        {"name": "moa", "output": str(folder / "left" / "train" / "moa"), "stop": 3},
        {"name": "moa", "output": str(folder / "resumed" / "train" / "moa"), "stop": 3},
        {"name": "moa", "output": str(folder / "resumed" / "train" / "moa")},
    ]
    execute("-m", "tests.training.two_processes", json.dumps([common | run for run in runs]))
    return folder


def assert_close(a: Path, b: Path) -> None:
    """Losses and gradient norms of every step are equal to rounding; each follows from all steps before it.

    Weights are not compared: Adam makes whole steps of the rounding of gradients that are zero in theory.
    """
    assert len(log(a)) == UNEVEN["steps"]
    for row, other in zip(log(a), log(b), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)


def processes(folder: Path) -> int:
    return int(json.loads((folder / "train.json").read_text())["processes"])


def test_the_processes_have_different_numbers_of_samples_with_subjects(models, shards):
    """Otherwise the tests below could not tell a mean over processes from a mean over samples."""
    config = tiny.config(models, **UNEVEN)
    prior = FrozenPrior(load_prior(models[0], "cpu"))
    data = Records(shards, config, prior.sizes(8), prior.find_tokens)
    halves = []
    for shown in map(data.shown, range(config.steps)):
        halves.append(tuple(sum(n > 0 for n in half) for half in (shown[:2], shown[2:])))
    assert any(a != b for a, b in halves)
    assert any(min(half) == 0 < max(half) for half in halves), halves


def test_accelerate_launch_gives_the_losses_of_one_process(one, launched):
    assert (processes(one / "moa"), processes(launched)) == (1, 2)
    assert_close(one / "moa", launched)


def test_fastcomposer_on_two_processes_in_two_parts_gives_the_losses_of_one(one, forked):
    assert processes(forked / "whole" / "fastcomposer") == 2
    assert_close(one / "fastcomposer", forked / "whole" / "fastcomposer")


def test_two_interrupted_processes_end_like_unbroken_ones(launched, forked):
    """To the last bit."""
    assert not (forked / "left" / "train" / "moa").exists()
    resumed = forked / "resumed" / "train" / "moa"
    assert processes(resumed) == 2
    assert log(resumed) == log(launched)
    first, second = weights(resumed), weights(launched)
    assert all(torch.equal(first[n], second[n]) for n in first.keys() | second.keys())


def test_one_process_goes_on_from_what_two_left(one, forked, models, shards, subjects, tmp_path, monkeypatch):
    shutil.copytree(forked / "left" / ".checkpoints", tmp_path / ".checkpoints")
    steps, step = [], loop.Trainer._step
    monkeypatch.setattr(
        loop.Trainer, "_step", lambda self, *rest: steps.append(self.progress.step) or step(self, *rest)
    )
    moa.run(tiny.config(models, **UNEVEN), shards, subjects, tmp_path / "train" / "moa")
    assert steps == [2, 3, 4]
    assert_close(one / "moa", tmp_path / "train" / "moa")
