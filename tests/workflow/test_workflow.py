"""The workflow as a user meets it: what would run, what is refused, and what happens after a SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from moa.hashing import ROOT
from tests.training import tiny
from tests.workflow.conftest import Run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("preset", ["miniature", "paper"])
def test_dry_run(snakemake: Run, weights: Path, preset: str) -> None:
    arguments = ["--dry-run", "--quiet", "host", "reason"]
    changed = {"weights": str(weights)} if preset == "miniature" else None
    if preset == "paper":
        arguments += ["--configfile", "config/paper.yaml"]
    done = snakemake(*arguments, config=changed)
    assert done.returncode == 0, done.stderr
    assert "train_moa" in done.stdout + done.stderr or "train" in done.stdout + done.stderr
    assert ("render" in done.stdout + done.stderr) == (preset == "miniature")


def test_wrong_key_stops_before_anything_runs(snakemake: Run) -> None:
    done = snakemake("--dry-run", config={"train": {"moa": {"learning_rate": 1}}})
    assert done.returncode == 1
    assert "unknown key train.moa.learning_rate" in done.stdout + done.stderr


def test_missing_weights_are_named(snakemake: Run) -> None:
    done = snakemake("--dry-run", config={"weights": "nowhere"})
    assert done.returncode == 1
    assert ".id: there is no model in nowhere/" in done.stdout + done.stderr
    assert "snakemake pretrain" in done.stdout + done.stderr


# --- SIGKILL ----------------------------------------------------------------------------------------------

PROTOCOL = {
    "name": "tiny",
    "validation": {"subjects": 1, "kinds": {"single": {"images": 1, "prompts": {"x": ["a {S} in blue"]}}}},
    "test": {
        "subjects": 4,
        "kinds": {"single": {"images": 6, "prompts": {"x": ["a {S} in a red hat", "a {S} in blue"]}}},
    },
}
UNUSED = ("captioner", "segmenter", "clip_judge", "identity", "detector")
TRAINED, MADE = "results/tiny/train/moa", "results/tiny/made/moa/test-single-000.parquet"


def prepare(project: Path) -> None:
    """Tiny models, records and subjects, and a configuration that uses them."""
    prior, image_encoder = tiny.save_models(project / "models")
    results = project / "results/tiny"
    for folder in ("data/records", "subjects"):
        (results / folder).mkdir(parents=True)
    tiny.save_records(results / "data/records")
    for split in ("validation", "test"):
        tiny.save_subjects(results / f"subjects/{split}.parquet")
    (project / "protocol.yaml").write_text(yaml.safe_dump(PROTOCOL))
    changes = {
        "output": "results/tiny",
        "protocol": "protocol.yaml",
        "models": {
            **{role: {"id": "not/used"} for role in UNUSED},
            "prior": {"id": prior.id},
            "image_encoder": {"id": image_encoder.id},
        },
        "render": {"train": 12, "validation": 6, "shard_size": 6},
        "train": {"moa": {"steps": 60, "batch_size": 4, "checkpoint_every": 5, "validate_every": 0}},
        "generate": {"sampling": {"steps": 6, "batch_size": 2}},
    }
    (project / "changes.yaml").write_text(yaml.safe_dump(changes))


def start(project: Path) -> subprocess.Popen[bytes]:
    """Train MoA and make its images, in a process group of its own."""
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--configfile", "changes.yaml", "--", MADE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (project / "snakemake.log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=project, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def kill_when(project: Path, pattern: str, count: int, seconds: float = 240) -> None:
    """SIGKILL the whole process group once `count` files match `pattern` below the results."""
    run, deadline = start(project), time.monotonic() + seconds
    while len(list((project / "results/tiny").glob(pattern))) < count:
        assert run.poll() is None, (project / "snakemake.log").read_text()
        assert time.monotonic() < deadline, (project / "snakemake.log").read_text()
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def finish(project: Path) -> None:
    run = start(project)
    assert run.wait(timeout=400) == 0, (project / "snakemake.log").read_text()


def results(project: Path) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    """Trained weights, and pixels of the images."""
    trained, images = project / TRAINED, project / "results/tiny/images"
    weights = {path.name: path.read_bytes() for path in trained.glob("*.safetensors")}
    pixels = {
        path.relative_to(images).as_posix(): np.asarray(Image.open(path)) for path in images.rglob("*.png")
    }
    return weights, pixels


def test_the_same_command_goes_on_after_a_kill(
    project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    unbroken = tmp_path_factory.mktemp("unbroken")
    for link in project.iterdir():
        (unbroken / link.name).symlink_to(ROOT / link.name)
    for folder in (project, unbroken):
        prepare(folder)
    finish(unbroken)

    kill_when(project, ".checkpoints/*/step-*", 2)
    assert not (project / TRAINED).exists()
    assert list((project / ".snakemake/locks").iterdir()), "the killed run left no lock: nothing was tested"
    kill_when(project, "images/moa/test/single/*.png", 5)
    finish(project)

    (weights, images), (expected_weights, expected_images) = results(project), results(unbroken)
    assert weights
    assert weights == expected_weights
    assert len(images) == 4 * 2 * 6
    assert images.keys() == expected_images.keys()
    assert all(np.array_equal(images[name], expected_images[name]) for name in images)

    again = start(project)
    assert again.wait(timeout=120) == 0
    assert "Nothing to be done" in (project / "snakemake.log").read_text()
