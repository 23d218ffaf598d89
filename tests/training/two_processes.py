"""`python -m tests.training.two_processes`: trainings on two processes, forked so that libraries load once.

Reads a JSON list of runs from the command line; each is a mapping of the arguments of `train`.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import debug_launcher

from moa.config import load
from moa.training.config import TrainConfig
from moa.training.loop import Trainer


def stop_after(step: int) -> None:
    """End the training of this process in the middle, right after a step."""
    account = Trainer._account

    def stop(trainer: Trainer, values: dict[str, float]) -> None:
        account(trainer, values)
        if trainer.progress.step == step:
            raise KeyboardInterrupt

    Trainer._account = stop  # type: ignore[method-assign]


def train(arguments: dict[str, Any]) -> None:
    """One process of a run: `name`, `config`, `records`, `subjects`, `output`, and perhaps `stop`."""
    torch.set_num_threads(1)
    if arguments.get("stop"):
        stop_after(arguments["stop"])
    trainer = import_module(f"moa.training.{arguments['name']}")
    records, subjects, output = arguments["records"], Path(arguments["subjects"]), Path(arguments["output"])
    try:
        trainer.run(load(TrainConfig, arguments["config"]), [Path(r) for r in records], subjects, output)
    except KeyboardInterrupt:
        assert arguments.get("stop")


if __name__ == "__main__":
    for run in json.loads(sys.argv[1]):
        debug_launcher(train, (run,), num_processes=2)
