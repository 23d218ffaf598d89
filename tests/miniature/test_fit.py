"""The loop that trains the miniature's own models: exact resumes and an honest log."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from moa.miniature.fit import Budget, fit, optimizers
from tests.miniature.trainings import copied, equal, log

BUDGET = Budget(
    steps=12, batch_size=6, lr=0.05, warmup=2, ema=0.9, log_every=5, checkpoint_seconds=0.0, seed=3
)


def regression(folder, stop=None, budget=BUDGET):
    """Fit a small net with running statistics and its own noise; `stop` is the step that a kill comes in."""
    torch.manual_seed(0)
    inputs, width = (16, 16) if budget.optimizer == "muon" else (4, 8)
    model = torch.nn.Sequential(
        torch.nn.Linear(inputs, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 1)
    )

    def loss(step, rng):
        if step == stop:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.normal(size=(budget.batch_size, inputs))).float()
        error = model(x + 0.1 * torch.randn_like(x)) - x.sum(1, keepdim=True)
        return {"error": error.square().mean(), "bias": error.mean().abs()}

    fit(model, loss, budget, folder)
    return model


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_training(a, b):
    assert log(a) == log(b)
    one, other = checkpoint(a), checkpoint(b)
    assert equal(one["model"], other["model"])
    assert all(
        torch.equal(x, y)
        for x, y in zip(one["ema"]["shadow_params"], other["ema"]["shadow_params"], strict=True)
    )


def test_a_loss_may_join_later(tmp_path):
    """As captions do, once the vision tower has learnt to see; its mean is over the steps that had it."""
    model = torch.nn.Linear(2, 1)

    def loss(step, rng):
        losses = {"seen": model.weight.square().sum()}
        return losses if step < 7 else losses | {"caption": 3 + 0 * model.bias.square().sum()}

    budget = replace(BUDGET, steps=10, bf16=False)
    fit(model, loss, budget, tmp_path / "whole")
    rows = log(tmp_path / "whole")
    assert [row["step"] for row in rows] == ["5", "10"]
    assert rows[0]["caption"] == "" and float(rows[1]["caption"]) == 3

    def killed(step, rng):
        if step == 8:
            raise KeyboardInterrupt
        return loss(step, rng)

    with pytest.raises(KeyboardInterrupt):
        fit(model, killed, budget, tmp_path / "killed")
    fit(model, loss, budget, tmp_path / "killed")
    assert float(log(tmp_path / "killed")[1]["caption"]) == 3


@pytest.mark.parametrize("changes", [{"bf16": False}, {}, {"optimizer": "muon"}])
def test_a_killed_training_ends_like_an_unbroken_one(tmp_path, changes):
    budget = replace(BUDGET, **changes)
    whole = regression(tmp_path / "whole", budget=budget)
    for stop in (1, 7, 11):
        with pytest.raises(KeyboardInterrupt):
            regression(tmp_path / "killed", stop, budget)
        assert checkpoint(tmp_path / "killed")["step"] == stop
    resumed = regression(tmp_path / "killed", budget=budget)
    assert_same_training(tmp_path / "whole", tmp_path / "killed")
    assert equal(copied(whole), copied(resumed))
    assert not equal(copied(whole), checkpoint(tmp_path / "whole")["model"])  # what is kept is the average


def test_muon_turns_matrices_and_leaves_the_rest_to_adamw():
    """An orthogonal step as large as AdamW's (0.2 · √side · lr): all its singular values are alike."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 3))
    budget = replace(BUDGET, optimizer="muon", weight_decay=0.0)
    adamw, muon = optimizers(list(model.parameters()), budget)
    held = [{id(p) for group in o.param_groups for p in group["params"]} for o in (muon, adamw)]
    assert held[0] == {id(model[0].weight)}
    assert held[1] == {id(p) for p in model.parameters()} - held[0]
    before = model[0].weight.detach().clone()
    model(torch.randn(64, 32)).square().sum().backward()
    muon.step()
    turned = torch.linalg.svdvals(before - model[0].weight.detach())[
        :3
    ]  # three outputs: a gradient of rank 3
    assert turned / (0.2 * 32**0.5 * budget.lr) == pytest.approx(torch.ones(3), abs=0.35)
    (only,) = optimizers(list(model.parameters()), BUDGET)
    assert isinstance(only, torch.optim.AdamW)


def test_rows_past_the_last_checkpoint_are_written_anew(tmp_path):
    regression(tmp_path / "whole")
    killed, kept = tmp_path / "killed", tmp_path / "kept.pt"
    for stop, copy in ((7, True), (11, False)):
        with pytest.raises(KeyboardInterrupt):
            regression(killed, stop)
        if copy:
            shutil.copy(killed / "checkpoint.pt", kept)
    assert [row["step"] for row in log(killed)] == ["5", "10"]
    shutil.copy(kept, killed / "checkpoint.pt")
    regression(killed)
    assert_same_training(tmp_path / "whole", killed)


def test_checkpoints_are_no_more_frequent_than_asked(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        regression(tmp_path, 11, replace(BUDGET, checkpoint_seconds=3600.0))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_every_step_counts_in_the_log(tmp_path):
    rows = []
    for every in (5, 1):
        regression(tmp_path / str(every), budget=replace(BUDGET, log_every=every))
        rows.append(log(tmp_path / str(every)))
    assert [row["step"] for row in rows[0]] == ["5", "10", "12"]
    single = [float(row["error"]) for row in rows[1]]
    means = [np.mean(single[:5]), np.mean(single[5:10]), np.mean(single[10:])]
    assert [float(row["error"]) for row in rows[0]] == pytest.approx(means)


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (lambda w: (w * float("nan")).sum(), "loss is nan"),
        (lambda w: (w * 0).sqrt().sum(), "gradient is nan"),
    ],
)
def test_what_is_not_finite_stops_the_training(tmp_path, broken, what):
    """And does so before it reaches weights or checkpoint."""
    model = torch.nn.Linear(2, 2)

    def loss(step, rng):
        return {"x": broken(model.weight) if step == 2 else model.weight.square().sum()}

    with pytest.raises(FloatingPointError, match=rf"{what} at step 2: lower lr \(0\.05\)"):
        fit(model, loss, BUDGET, tmp_path)
    assert all(p.isfinite().all() for p in model.parameters())
    assert checkpoint(tmp_path)["step"] == 2


def test_rate_warms_up_and_falls_to_nothing():
    budget = Budget(steps=400, batch_size=1, lr=0.2, warmup=40)
    rates = [budget.rate(step) for step in range(400)]
    assert rates[0] == pytest.approx(0.2 / 40)
    assert all(b > a for a, b in pairwise(rates[:39]))
    assert all(b < a for a, b in pairwise(rates[40:]))
    assert 0.97 * 0.2 < max(rates) <= 0.2
    assert rates[200] == pytest.approx(0.1)
    assert 0 < rates[-1] < 1e-4 * 0.2
    assert Budget(steps=10, batch_size=1, lr=0.2, warmup=0).rate(0) == 0.2
