"""One training loop for every model of the miniature: keyed batches, cosine rate, EMA, exact resume."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from moa.files import write_atomically

LossFunction = Callable[[int, np.random.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Budget:
    """How a model is trained."""

    steps: int  # optimizer steps
    batch_size: int  # images a step
    lr: float  # peak; linear warm-up, then a cosine down to 0
    weight_decay: float = 0.01
    warmup: int = 50  # steps
    ema: float = 0.0  # decay of the averaged weights that are kept in the end; 0 = no averaging
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: of weight matrices; all else keeps AdamW
    bf16: bool = True  # autocast; sums, norms and the optimizer stay in fp32
    clip: float = 1.0  # norm that gradients are clipped to
    checkpoint_seconds: float = 300.0  # at most this much work is lost by a kill
    log_every: int = 20  # steps a row of log.csv
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step (0 … steps − 1)."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


MUON_SIDE = 16  # smallest side of a matrix that Muon orthogonalises; heads of few classes keep AdamW


def optimizers(parameters: list[nn.Parameter], budget: Budget) -> list[torch.optim.Optimizer]:
    """AdamW, behind Muon (Jordan et al., 2024) for matrices where the budget says so."""
    matrices = [p for p in parameters if p.ndim == 2 and min(p.shape) >= MUON_SIDE]
    matrices = matrices if budget.optimizer == "muon" else []
    of_muon = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in of_muon]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=budget.lr, weight_decay=budget.weight_decay, betas=(0.9, 0.99))
    ]
    if matrices:
        muon = torch.optim.Muon(
            matrices, lr=budget.lr, weight_decay=budget.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        made.append(muon)
    return made


class Run:
    """The state of a training that survives a kill: weights, average, optimizer, step, open row of log."""

    def __init__(self, model: nn.Module, budget: Budget, folder: Path):
        self.model, self.budget, self.folder = model, budget, folder
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = optimizers(parameters, budget)
        self.ema = EMAModel(parameters, decay=budget.ema) if budget.ema else None
        self.parameters, self.step, self.seconds = parameters, 0, 0.0
        self.sums: dict[str, float] = {}  # losses since the last row of the log
        self.counts: dict[str, int] = {}  # steps that each was summed over; a loss may join later
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def file(self) -> Path:
        return self.folder / "checkpoint.pt"

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if not self.file.exists():
            return
        state = torch.load(self.file, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.sums, self.counts = state["sums"], state["counts"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema.state_dict() if self.ema else None,
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "counts": self.counts,
        }
        write_atomically(self.file, lambda part: torch.save(state, part))

    def update(self, losses: dict[str, Tensor]) -> float:
        """One optimizer step on the sum of the losses; returns the gradient norm before clipping.

        FloatingPointError, before any weight changes, if the loss or its gradient is not finite.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.budget.rate(self.step)
        total = torch.stack([v.float() for v in losses.values()]).sum()
        self._check("loss", total)
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.budget.clip)
        self._check("norm of the gradient", norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.ema:
            self.ema.step(self.parameters)
        self.step += 1
        return float(norm)

    def _check(self, name: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value.item()} at step {self.step}: lower lr ({self.budget.lr})"
            )

    def add(self, losses: dict[str, Tensor]) -> None:
        """Count a step's losses into the next row of the log."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
            self.counts[name] = self.counts.get(name, 0) + 1

    def log(self, norm: float) -> dict[str, float]:
        """Append mean losses to log.csv, dropping rows that a killed run wrote past its checkpoint."""
        means = {name: value / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        row = {"step": self.step, **means, "grad_norm": norm, "seconds": round(self.seconds, 1)}
        file = self.folder / "log.csv"
        rows = list(csv.DictReader(file.open())) if file.exists() else []
        rows = [r for r in rows if int(r["step"]) < self.step]
        write_atomically(file, lambda part: _write_csv(part, [*rows, row]))
        return means


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        names = dict.fromkeys(name for row in rows for name in row)  # losses may join later in a training
        writer = csv.DictWriter(file, fieldnames=list(names))
        writer.writeheader()
        writer.writerows(rows)


def fit(model: nn.Module, loss: LossFunction, budget: Budget, folder: Path) -> float:
    """Train `model` in place (its averaged weights when `budget.ema`); returns the seconds spent.

    `folder` holds log.csv and the checkpoint that a killed run goes on from: a training of other data, code
    or budget needs another folder.

    `loss(step, rng)` gives named losses of one batch; `rng` depends on (seed, step) alone, so a resumed
    training sees the batches that an unbroken one sees.
    """
    run = Run(model, budget, folder)
    run.resume()
    last_save = last = time.monotonic()
    with tqdm(total=budget.steps, initial=run.step, desc=folder.name, mininterval=5) as bar:
        while run.step < budget.steps:
            rng = np.random.default_rng([budget.seed, run.step])
            torch.manual_seed(int(rng.integers(2**31)))
            with torch.autocast("cpu", torch.bfloat16, enabled=budget.bf16):
                losses = loss(run.step, rng)
            norm = run.update(losses)
            now = time.monotonic()
            run.seconds, last = run.seconds + now - last, now
            run.add(losses)
            bar.update()
            if run.step % budget.log_every == 0 or run.step == budget.steps:
                bar.set_postfix({k: f"{v:.4f}" for k, v in run.log(norm).items()})
            if now - last_save > budget.checkpoint_seconds:
                run.save()
                last_save = now
    run.save()
    if run.ema:
        run.ema.copy_to(run.parameters)
    return run.seconds
