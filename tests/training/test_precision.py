"""Mixed precision: what is frozen in 16 bits, what is trained in 32, and what `auto` means on a machine."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from moa import machine
from moa.training import loop, moa
from tests.training import tiny
from tests.training.test_training_loop import PROMPTS


@pytest.fixture(autouse=True)
def forget():
    """Accelerate keeps the first precision of a process; call it between two trainings."""
    yield AcceleratorState._reset_state
    AcceleratorState._reset_state(reset_partial_state=True)


def losses(folder):
    return [float(row["loss_masked"]) for row in csv.DictReader((folder / "log.csv").open())]


def test_bfloat16_trains_like_single_precision(models, shards, subjects, tmp_path, forget):
    """To rounding (7 bits); the weights that train, and so those that are saved, keep 32 bits."""
    common = {"log_every": 1, "validate_every": 4, "validation_prompts": PROMPTS}
    for precision in ("no", "bf16"):
        config = tiny.config(models, precision=precision, **common)
        forget(reset_partial_state=True)
        moa.run(config, shards, subjects, tmp_path / precision / "moa")
    single, half = (losses(tmp_path / p / "moa") for p in ("no", "bf16"))
    assert half == pytest.approx(single, rel=0.05)
    assert half != single
    (file,) = (tmp_path / "bf16/moa").glob("*.safetensors")
    assert {value.dtype for value in load_file(file).values()} == {torch.float32}
    assert (tmp_path / "bf16/moa/step-000004.png").is_file()


def test_the_frozen_unet_takes_half_the_memory(models):
    config = tiny.config(models, precision="bf16")
    trainee = moa.MoATrainee(config, "cpu")
    ours = {id(p) for p in trainee.trained().values()}
    assert {p.dtype for p in trainee.trained().values()} == {torch.float32}
    assert {p.dtype for p in trainee.unet.parameters() if id(p) not in ours} == {torch.bfloat16}


@pytest.mark.parametrize(("capable", "precision"), [(True, "bf16"), (False, "no")])
def test_auto_follows_the_machine(
    capable, precision, models, shards, subjects, tmp_path, monkeypatch, forget
):
    forget(reset_partial_state=True)
    instructions = dict.fromkeys(machine.BF16_INSTRUCTIONS, capable)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True} | instructions)
    moa.run(tiny.config(models, steps=1, precision="auto"), shards, subjects, tmp_path / "train" / "moa")
    about = json.loads((tmp_path / "train/moa/train.json").read_text())
    assert about["config"]["precision"] == precision
    config = tiny.config(models, precision="fp16")
    assert config.on_this_machine() is config


def test_the_accelerator_needs_a_precision_of_this_machine(models):
    with pytest.raises(ValueError, match="auto"):
        loop.make_accelerator(tiny.config(models, precision="auto"))
