"""Training is exact: interrupted, split or cached, it comes to the same; and the prior stays frozen."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moa.data.subjects import read_subjects
from moa.sampling import load_adapter
from moa.training import checkpoint, fastcomposer, loop, moa
from moa.training.loop import Trainer
from tests.training import tiny

TRAINEES = {"moa": moa, "fastcomposer": fastcomposer}
PROMPTS = ("a {word} in a red hat",)


def log(folder: Path) -> list[dict[str, str]]:
    """Rows of log.csv without the time."""
    with (folder / "log.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def assert_same(one: Path, other: Path) -> None:
    """Weights, log and pictures are equal to the last bit."""
    assert log(one) == log(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    grids = sorted(p.name for p in one.glob("*.png"))
    assert grids == sorted(p.name for p in other.glob("*.png"))
    assert all((one / g).read_bytes() == (other / g).read_bytes() for g in grids)


@pytest.mark.parametrize("name", TRAINEES)
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_interrupted_training_ends_the_same(name, ema, models, shards, subjects, tmp_path, monkeypatch):
    config = tiny.config(
        models, steps=5, ema=ema, checkpoint_every=2, validate_every=2, validation_prompts=PROMPTS
    )
    TRAINEES[name].run(config, shards, subjects, tmp_path / "whole" / name)

    account = Trainer._account

    def stop_at_3(self, values):
        account(self, values)
        if self.progress.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_account", stop_at_3)
    with pytest.raises(KeyboardInterrupt):
        TRAINEES[name].run(config, shards, subjects, tmp_path / "parts" / name)
    assert not (tmp_path / "parts" / name).exists()  # nothing half-made to be taken for a result
    monkeypatch.undo()
    TRAINEES[name].run(config, shards, subjects, tmp_path / "parts" / name)
    assert_same(tmp_path / "whole" / name, tmp_path / "parts" / name)


def test_peak_memory_is_that_of_all_attempts(models, shards, subjects, tmp_path, monkeypatch):
    config = tiny.config(models, checkpoint_every=2)
    save = Trainer.save

    def stop(self):
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as first:
        first.setattr(loop, "peak_memory", lambda: 9_000)
        first.setattr(loop, "peak_gpu_memory", lambda: 900)
        first.setattr(Trainer, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            moa.run(config, shards, subjects, tmp_path / "train" / "moa")
    monkeypatch.setattr(loop, "peak_memory", lambda: 5_000)
    monkeypatch.setattr(loop, "peak_gpu_memory", lambda: 500)
    moa.run(config, shards, subjects, tmp_path / "train" / "moa")
    about = json.loads((tmp_path / "train" / "moa" / "train.json").read_text())
    assert (about["peak_memory_bytes"], about["peak_gpu_bytes"]) == (9_000, 900)


@pytest.mark.parametrize("step", [2, 4])
def test_stopped_right_after_a_checkpoint_nothing_is_lost(
    step, models, shards, subjects, tmp_path, monkeypatch
):
    config = tiny.config(models, checkpoint_every=2, validate_every=2, validation_prompts=PROMPTS)
    moa.run(config, shards, subjects, tmp_path / "whole" / "moa")
    save = Trainer.save

    def stop(self):
        save(self)
        if self.progress.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        moa.run(config, shards, subjects, tmp_path / "parts" / "moa")
    monkeypatch.undo()
    moa.run(config, shards, subjects, tmp_path / "parts" / "moa")
    assert_same(tmp_path / "whole" / "moa", tmp_path / "parts" / "moa")


SCRIPT = """
import sys, torch
from pathlib import Path
from moa.training import moa
from tests.training import tiny
from moa.methods import ModelSource
torch.set_num_threads(1)
a = sys.argv
config = tiny.config((ModelSource(a[1]), ModelSource(a[2])), steps={steps}, batch_size=4, checkpoint_every=1)
moa.run(config, [Path(p) for p in a[3:5]], Path(a[5]), Path(a[6]))
"""


def start(models, shards, subjects, output, steps):
    """Train in a process group of its own."""
    arguments = [models[0].id, models[1].id, *map(str, shards), str(subjects), str(output)]
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(steps=steps), *arguments],
        start_new_session=True, cwd=root, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]


@pytest.mark.slow
def test_killed_training_goes_on(models, shards, subjects, tmp_path):
    steps = 30
    process = start(models, shards, subjects, tmp_path / "killed" / "moa", steps)
    checkpoints = tmp_path / ".checkpoints"
    while process.poll() is None and not list(checkpoints.glob("*/step-0000000[3-9]")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the training ended before it could be killed"
    finish(start(models, shards, subjects, tmp_path / "killed" / "moa", steps))
    finish(start(models, shards, subjects, tmp_path / "whole" / "moa", steps))
    assert_same(tmp_path / "killed" / "moa", tmp_path / "whole" / "moa")


def rows_close(one: Path, other: Path) -> None:
    for row, second in zip(log(one), log(other), strict=True):
        for column in row:
            assert float(row[column]) == pytest.approx(float(second[column]), rel=1e-4, abs=1e-7), column


@pytest.mark.parametrize("name", TRAINEES)
def test_accumulated_parts_equal_one_pass(name, models, shards, subjects, tmp_path):
    for parts in (1, 2):
        config = tiny.config(models, accumulation=parts)
        TRAINEES[name].run(config, shards, subjects, tmp_path / str(parts) / name)
    rows_close(tmp_path / "1" / name, tmp_path / "2" / name)


def test_cache_and_workers_change_nothing(models, shards, subjects, tmp_path):
    moa.run(tiny.config(models), shards, subjects, tmp_path / "cached" / "moa")
    fresh = tiny.config(models, cache=False, workers=1)
    moa.run(fresh, shards, subjects, tmp_path / "fresh" / "moa", keep_checkpoints=True)
    rows_close(tmp_path / "cached" / "moa", tmp_path / "fresh" / "moa")
    kept = {path.name for path in tmp_path.glob(".checkpoints/*/*")}
    assert "step-00000004" in kept and loop.SCRATCH not in kept  # what records were mapped from goes


def test_only_the_adapter_changes(models, shards, subjects, tmp_path):
    config = tiny.config(models)
    torch.manual_seed(0)
    trainee = moa.MoATrainee(config, "cpu")
    trained = {id(p) for p in trainee.trained().values()}
    frozen = {n: p for n, p in trainee.named_parameters() if id(p) not in trained}
    frozen |= {f"vae.{n}": p for n, p in trainee.prior.pipe.vae.named_parameters()}
    before = {n: p.detach().clone() for n, p in frozen.items()}
    old = {n: p.detach().clone() for n, p in trainee.trained().items()}
    data = loop.Records(shards, config, trainee.prior.sizes(trainee.crop_side()), trainee.prior.find_tokens)
    trainee.prior.fill(data)
    Trainer(trainee, data, tmp_path / "checkpoints", loop.make_accelerator(config), None).train()
    assert len(before) > 100
    assert all(torch.equal(frozen[n], before[n]) for n in before)
    assert all(p.grad is None for p in frozen.values())
    assert all(not torch.equal(p, old[n]) for n, p in trainee.trained().items() if "key.bias" not in n)


@pytest.mark.parametrize(
    ("ablation", "gone"),
    [
        ({"router": "none"}, "router"),
        ({"spacetime": False}, "prompt.position"),
        ({"image_encoder_layers": 0}, "image_encoder_layers"),
    ],
    ids=["one path", "no t and l", "frozen encoder"],
)
def test_an_ablation_trains_less_and_is_loaded_as_it_was_trained(
    ablation, gone, models, shards, subjects, tmp_path
):
    moa.run(tiny.config(models), shards, subjects, tmp_path / "whole" / "moa")
    moa.run(tiny.config(models, **ablation), shards, subjects, tmp_path / "ablated" / "moa")
    whole, ablated = weights(tmp_path / "whole" / "moa"), weights(tmp_path / "ablated" / "moa")
    assert {name for name in whole if gone in name} == whole.keys() - ablated.keys() != set()
    assert ablated.keys() < whole.keys()
    adapter = load_adapter(tmp_path / "ablated" / "moa", "cpu", torch.float32)
    assert {name: value.shape for name, value in adapter.named_parameters()} == {
        name: value.shape for name, value in ablated.items()
    }


def test_more_experts_train_apart_and_are_loaded_as_they_were_trained(models, shards, subjects, tmp_path):
    """Several personalization experts start equal: their routers' random start must tell them apart."""
    config = tiny.config(models, experts=3, router="mlp", router_width=5, frequencies=2)
    moa.run(config, shards, subjects, tmp_path / "train" / "moa")
    adapter = load_adapter(tmp_path / "train" / "moa", "cpu", torch.float32)
    assert [adapter.config[role]["id"] for role in ("prior", "image_encoder")] == [m.id for m in models]
    keys = ("experts", "router", "router_width", "frequencies")
    assert [adapter.config[key] for key in keys] == [3, "mlp", 5, 2]
    for name in adapter.sizes:
        first, second = adapter.mixture(name).experts
        assert not torch.equal(first.value.weight, second.value.weight)
        assert adapter.mixture(name).router[0].out_features == 5
    with pytest.raises(ValueError, match="experts: 1; there are the prior and at least one"):
        moa.MoATrainee(tiny.config(models, experts=1), "cpu")


def test_a_changed_setting_starts_anew(models, shards, monkeypatch):
    config = tiny.config(models)
    same = loop.run_key(tiny.config(models, checkpoint_every=7, workers=3), "moa", shards, "code")
    assert loop.run_key(config, "moa", shards, "code") == same
    others = [
        loop.run_key(tiny.config(models, lr=2e-3), "moa", shards, "code"),
        loop.run_key(config, "fastcomposer", shards, "code"),
        loop.run_key(config, "moa", shards[:1], "code"),
        loop.run_key(config, "moa", shards, "other code"),
        loop.run_key(tiny.config(models, device="cuda"), "moa", shards, "code"),
    ]
    monkeypatch.setattr(loop, "libraries", lambda: {"torch": "1.0"})
    others.append(loop.run_key(config, "moa", shards, "code"))
    assert len({same, *others}) == 7


def test_training_runs_on_the_device_of_the_config(models, monkeypatch):
    asked = []
    monkeypatch.setattr(loop, "Accelerator", lambda cpu, **options: asked.append(cpu))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    loop.make_accelerator(tiny.config(models))
    loop.make_accelerator(tiny.config(models, device="cuda"))
    assert asked == [True, False]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="device: cuda, but PyTorch finds no GPU"):
        loop.make_accelerator(tiny.config(models, device="cuda"))


def test_two_trainings_of_the_same_thing_are_refused(models, shards, subjects, tmp_path):
    config = tiny.config(models)
    output = tmp_path / "train" / "moa"
    folder = tmp_path / ".checkpoints" / f"moa-{loop.run_key(config, 'moa', shards, loop.code_of('moa'))}"
    with checkpoint.locked(folder), pytest.raises(RuntimeError, match=f"process {os.getpid()}"):
        moa.run(config, shards, subjects, output)
    moa.run(config, shards, subjects, output)  # a lock left behind by nobody stops nobody
    assert not folder.exists()


def test_a_loss_that_is_no_number_stops_training(models, shards, subjects, tmp_path):
    with pytest.raises(FloatingPointError, match="lower `lr`"):
        moa.run(
            tiny.config(models, lr=1e30, clip=1e30, steps=20), shards, subjects, tmp_path / "train" / "moa"
        )


def spoil(monkeypatch, step: int, factor: float) -> None:
    """Let the gradient of that step, and of it alone, come out so many times too large; the loss is right."""
    forward, steps = moa.MoATrainee.forward, iter(range(100))

    def spoiled(self, batch):
        losses = forward(self, batch)
        if next(steps) == step:
            losses["loss"].register_hook(lambda gradient: gradient * factor)
        return losses

    monkeypatch.setattr(moa.MoATrainee, "forward", spoiled)


def test_a_gradient_that_is_no_number_never_reaches_the_weights(
    models, shards, subjects, tmp_path, monkeypatch
):
    """Also not in the last step, whose weights no later loss would look at."""
    config = tiny.config(models, steps=2, checkpoint_every=1, ema=0.5)
    moa.run(config, shards, subjects, tmp_path / "whole" / "moa")
    spoil(monkeypatch, 1, math.nan)
    with pytest.raises(FloatingPointError, match="gradient's norm is nan at step 1: lower `lr`"):
        moa.run(config, shards, subjects, tmp_path / "parts" / "moa")
    assert not (tmp_path / "parts" / "moa").exists()
    monkeypatch.undo()
    moa.run(config, shards, subjects, tmp_path / "parts" / "moa")  # from the checkpoint of before
    assert_same(tmp_path / "whole" / "moa", tmp_path / "parts" / "moa")


def scaled(models, shards, folder: Path) -> Trainer:
    """A training whose loss is scaled as in fp16, which the CPU does not have."""
    config = tiny.config(models, steps=3, log_every=1)
    accelerator = loop.make_accelerator(config)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    return loop.build(config, moa.MoATrainee, shards, folder, accelerator, ())


def test_steps_that_the_scaler_skips_are_allowed(models, shards, tmp_path, monkeypatch):
    trainer = scaled(models, shards, tmp_path / "skips")
    spoil(monkeypatch, 1, math.inf)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0
    assert not math.isfinite(trainer.progress.rows[1]["grad_norm"])
    assert all(bool(p.isfinite().all()) for p in trainer.parameters.values())


def test_a_norm_that_overflows_unseen_by_the_scaler_stops_training(models, shards, tmp_path, monkeypatch):
    trainer = scaled(models, shards, tmp_path / "overflows")
    spoil(monkeypatch, 1, 1e25)
    with pytest.raises(FloatingPointError, match="gradient's norm is inf at step 1"):
        trainer.train()


@pytest.mark.parametrize("kind", [moa.MoATrainee, fastcomposer.FastComposerTrainee])
def test_gradient_checkpointing_keeps_less_and_computes_the_same(kind, models, shards):
    losses, gradients, kept = {}, {}, {}
    for on in (False, True):
        config = tiny.config(models, gradient_checkpointing=on, cache=False)
        torch.manual_seed(0)
        trainee, sizes = kind(config, "cpu"), []
        data = loop.Records(
            shards, config, trainee.prior.sizes(trainee.crop_side()), trainee.prior.find_tokens
        )
        keep = lambda x, sizes=sizes: sizes.append(x.numel()) or x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            losses[on] = trainee(next(loop.batches(data, 0, 1, 0)))
        losses[on]["loss"].backward()
        gradients[on] = {name: p.grad for name, p in trainee.trained().items()}
        kept[on] = sum(sizes)
    assert all(torch.equal(losses[True][name], loss) for name, loss in losses[False].items())
    assert all(torch.equal(gradients[True][n], g) for n, g in gradients[False].items() if g is not None)
    assert any(bool(g.any()) for g in gradients[True].values() if g is not None)
    assert kept[True] < 0.5 * kept[False]


def test_missing_weights_are_named(models, shards, subjects, tmp_path):
    config = tiny.config((tiny.ModelSource(str(tmp_path / "nowhere" / "prior")), models[1]))
    with pytest.raises(FileNotFoundError, match=r"nowhere/prior does not exist; check `models\.prior`"):
        moa.run(config, shards, subjects, tmp_path / "train" / "moa")


@pytest.mark.parametrize("main", [True, False])
def test_only_the_main_process_draws_and_writes(main, models, shards, subjects, tmp_path, monkeypatch):
    config = tiny.config(models, steps=2, validate_every=2, validation_prompts=PROMPTS)
    monkeypatch.setattr(loop.Accelerator, "is_main_process", property(lambda self: main))
    shown = list(read_subjects(subjects).values())
    trainer = loop.build(
        config, moa.MoATrainee, shards, tmp_path / "run", loop.make_accelerator(config), shown
    )
    trainer.train()
    made = {path.name for path in tmp_path.rglob("step-*")}
    assert made == ({"step-000002.png", "step-00000002"} if main else set())
