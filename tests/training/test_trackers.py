"""Trackers see what log.csv and the grids show; one that is not there is an error, not a silent gap."""

from __future__ import annotations

import io

import numpy as np
import pytest
from accelerate import tracking
from PIL import Image

from moa.training import loop, moa
from moa.training.loop import Trainer
from tests.training import tiny
from tests.training.test_training_loop import PROMPTS, log


class Diary(tracking.GeneralTracker):
    """A tracker that remembers."""

    name, requires_logging_directory = "diary", False
    entries: list = []  # noqa: RUF012

    def __init__(self, project, **options):
        super().__init__()
        self.project = project

    @property
    def tracker(self):
        return self.entries

    def start(self):
        self.entries.append(("start", self.project))

    def store_init_configuration(self, values):
        self.entries.append(("config", values))

    def log(self, values, step=None, **options):
        self.entries.append(("log", step, values))

    def log_images(self, values, step=None, **options):
        self.entries.append(("images", step, values))


@pytest.fixture
def diary(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "diary", Diary)
    monkeypatch.setattr(Diary, "entries", [])
    return Diary.entries


def test_a_tracker_gets_settings_losses_and_grids(diary, models, shards, subjects, tmp_path):
    output = tmp_path / "train" / "moa"
    config = tiny.config(models, trackers=("diary",), validate_every=4, validation_prompts=PROMPTS)
    moa.run(config, shards, subjects, output)
    assert diary[0] == ("start", "moa")
    assert diary[1][1]["lr"] == config.lr and diary[1][1]["trackers"] == "('diary',)"
    rows = [(step, values) for kind, step, *values in diary[2:] if kind == "log"]
    assert [step for step, _ in rows] == [2, 4]
    for row, (_, (values,)) in zip(log(output), rows, strict=True):
        written = {k: float(v) for k, v in row.items() if k != "step"}
        assert written == pytest.approx({k: v for k, v in values.items() if k != "seconds"}, rel=1e-8)
    (image,) = [
        values["validation"] for kind, step, *rest in diary[2:] if kind == "images" for values in rest
    ]
    assert np.array_equal(image[0], np.asarray(Image.open(output / "step-000004.png")))


def test_trackers_change_no_result(models, shards):
    plain, tracked = tiny.config(models), tiny.config(models, trackers=("tensorboard",))
    assert loop.run_key(plain, "moa", shards, "") == loop.run_key(tracked, "moa", shards, "")


def test_a_tracker_that_is_not_there_is_named(models, monkeypatch):
    monkeypatch.setattr(loop, "get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match=r"trackers: wandb is not installed; run `pip install wandb`"):
        loop.make_accelerator(tiny.config(models, trackers=("wandb",)))
    with pytest.raises(ValueError, match=r"unknown 'tensorbord'; Accelerate has .*tensorboard"):
        loop.make_accelerator(tiny.config(models, trackers=("tensorbord",)))


def test_tensorboard_shows_each_step_once_also_after_an_interruption(
    models, shards, subjects, tmp_path, monkeypatch
):
    event = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny.config(
        models, steps=5, log_every=1, checkpoint_every=2, trackers=("tensorboard",), validate_every=5,
        validation_prompts=PROMPTS,
    )  # fmt: skip
    output = tmp_path / "train" / "moa"
    account = Trainer._account

    def stop(self, values):
        account(self, values)
        if self.progress.step == 3:  # the checkpoint is of step 2
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_account", stop)
        with pytest.raises(KeyboardInterrupt):
            moa.run(config, shards, subjects, output)
    moa.run(config, shards, subjects, output)
    seen = event.EventAccumulator(str(tmp_path / "train" / "moa-trackers" / "moa"))
    seen.Reload()
    points = seen.Scalars("loss")
    assert [p.step for p in points] == [1, 2, 3, 4, 5]
    assert [p.value for p in points] == pytest.approx([float(r["loss"]) for r in log(output)], rel=1e-6)
    (grid,) = seen.Images("validation")
    shown = np.asarray(Image.open(io.BytesIO(grid.encoded_image_string)))
    assert np.array_equal(shown, np.asarray(Image.open(output / "step-000005.png")))
