"""`--resume`: which checkpoint a training begins with, and that it ends like one that was never stopped."""

from __future__ import annotations

import json
import shutil

import pytest

from moa.training import checkpoint, fastcomposer, loop, moa
from moa.training.loop import Trainer
from tests.training import tiny
from tests.training.test_training_loop import PROMPTS, assert_same


@pytest.fixture
def steps(monkeypatch):
    """The steps that are really trained, as they happen."""
    seen, step = [], Trainer._step
    monkeypatch.setattr(
        Trainer, "_step", lambda self, *rest: seen.append(self.progress.step) or step(self, *rest)
    )
    return seen


def interrupted(config, shards, subjects, output, monkeypatch, after, **options):
    """Leave the checkpoints of a run that ended after some steps; returns their folder."""
    account = Trainer._account

    def stop(self, values):
        account(self, values)
        if self.progress.step == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_account", stop)
        with pytest.raises(KeyboardInterrupt):
            moa.run(config, shards, subjects, output, **options)
    return next((output.parent.parent / ".checkpoints").iterdir())


@pytest.mark.parametrize(
    ("resume", "trained"), [("latest", [4]), ("none", [0, 1, 2, 3, 4]), ("step-00000002", [2, 3, 4])]
)
def test_a_run_goes_on_from_where_it_is_told(
    resume, trained, models, shards, subjects, tmp_path, monkeypatch, steps
):
    """And what it left of later steps neither comes back nor stays."""
    config = tiny.config(
        models, steps=5, checkpoint_every=1, checkpoints_kept=3, validate_every=2, validation_prompts=PROMPTS
    )
    moa.run(config, shards, subjects, tmp_path / "whole" / "moa")
    output = tmp_path / "parts" / "train" / "moa"
    folder = interrupted(config, shards, subjects, output, monkeypatch, 5)
    assert checkpoint.steps(folder) == [2, 3, 4]
    for grid in (folder / "grids").glob("*.png"):
        if resume != "latest":
            grid.write_bytes(b"another run's")
    if resume == "step-00000002":  # the grid of step 2 is this run's
        (folder / "grids/step-000002.png").write_bytes((tmp_path / "whole/moa/step-000002.png").read_bytes())
    steps.clear()
    moa.run(config, shards, subjects, output, resume=resume)
    assert steps == trained
    assert_same(tmp_path / "whole" / "moa", output)
    assert json.loads((output / "train.json").read_text())["began_with"] == ""


def test_a_longer_training_goes_on_from_a_finished_one(models, shards, subjects, tmp_path, steps):
    """The learning rate is constant, so it must end like one that was so long from the start."""
    common = {"ema": 0.9, "log_every": 1}
    long = tiny.config(models, steps=5, **common)
    moa.run(long, shards, subjects, tmp_path / "whole" / "moa")
    short = tmp_path / "short" / "train" / "moa"
    moa.run(tiny.config(models, steps=3, **common), shards, subjects, short, keep_checkpoints=True)
    left = next((tmp_path / "short" / ".checkpoints").iterdir())
    for given in (left, left / "step-00000003"):
        steps.clear()
        output = tmp_path / given.name / "train" / "moa"
        moa.run(long, shards, subjects, output, resume=str(given))
        assert steps == [3, 4]
        assert_same(tmp_path / "whole" / "moa", output)
        about = json.loads((output / "train.json").read_text())
        assert about["began_with"] == str(left / "step-00000003")
        assert not list((output.parent.parent / ".checkpoints").iterdir())
    assert checkpoint.steps(left) == [3]  # nobody took them away


def test_a_killed_training_that_began_elsewhere_goes_on_and_is_nobody_elses(
    models, shards, subjects, tmp_path, monkeypatch, steps
):
    """The same command takes up its own checkpoints; the command without `--resume` does not."""
    short, long = (tiny.config(models, steps=n, checkpoint_every=1, lr_decay="none") for n in (2, 5))
    moa.run(short, shards, subjects, tmp_path / "short/train/moa", keep_checkpoints=True)
    start = str(next((tmp_path / "short/.checkpoints").iterdir()))
    output = tmp_path / "long/train/moa"
    interrupted(long, shards, subjects, output, monkeypatch, 4, resume=start)
    steps.clear()
    moa.run(long, shards, subjects, tmp_path / "long/train/moa", keep_checkpoints=True)
    assert steps == [0, 1, 2, 3, 4]
    assert json.loads((output / "train.json").read_text())["began_with"] == ""
    steps.clear()
    shutil.rmtree(start)  # it is not needed any more
    moa.run(long, shards, subjects, output, resume=start)
    assert steps == [3, 4]
    assert json.loads((output / "train.json").read_text())["began_with"].startswith(start)


def test_a_checkpoint_of_a_branch_is_named_by_its_path(tmp_path):
    trunk, elsewhere = tmp_path / "moa-0123", tmp_path / "other"
    for folder in (trunk / "step-00000001", elsewhere / "step-00000002"):
        folder.mkdir(parents=True)
    branch, first = checkpoint.own_folder(trunk, str(elsewhere))
    assert branch.parent == trunk.parent
    assert first == str(elsewhere / "step-00000002")
    (branch / "step-00000003").mkdir(parents=True)
    assert checkpoint.own_folder(trunk, str(elsewhere)) == (branch, "latest")
    assert checkpoint.own_folder(trunk, str(branch / "step-00000003")) == (branch, "step-00000003")
    for own in ("latest", "none", "step-00000001", str(trunk / "step-00000001"), str(trunk)):
        assert checkpoint.own_folder(trunk, own) == (trunk, own)


def test_what_does_not_fit_is_refused(models, shards, subjects, tmp_path):
    short = tiny.config(models, steps=2)
    moa.run(short, shards, subjects, tmp_path / "train" / "moa", keep_checkpoints=True)
    left = str(next((tmp_path / ".checkpoints").iterdir()))
    arguments = (shards, subjects, tmp_path / "train" / "other")
    with pytest.raises(FileNotFoundError, match=r"--resume nowhere: no such checkpoint; .*\(none yet\)"):
        moa.run(tiny.config(models, steps=3), *arguments, resume="nowhere")
    with pytest.raises(ValueError, match=r"has 2 steps, the config's `steps` is 1; raise it"):
        moa.run(tiny.config(models, steps=1), *arguments, resume=left)
    with pytest.raises(ValueError, match="other parameters"):
        moa.run(tiny.config(models, steps=3, image_encoder_layers=1), *arguments, resume=left)
    with pytest.raises(ValueError, match="other parameters"):
        fastcomposer.run(tiny.config(models, steps=3), *arguments, resume=left)


def test_as_many_checkpoints_stay_as_asked(models, shards, subjects, tmp_path):
    config = tiny.config(models, steps=5, checkpoint_every=1, checkpoints_kept=3)
    moa.run(config, shards, subjects, tmp_path / "train" / "moa", keep_checkpoints=True)
    key = loop.run_key(config, "moa", shards, loop.code_of("moa"))
    assert checkpoint.steps(tmp_path / ".checkpoints" / f"moa-{key}") == [3, 4, 5]
