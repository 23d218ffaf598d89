"""After a SIGKILL the same command goes on; while something lives, its locks are respected."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moa.hashing import ROOT

SLEEPER = "import time; from moa import runlock; {start}; print('up', flush=True); time.sleep(60)"


def start(code: str, cwd: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER.format(start=code)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    return process


def kill(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGKILL)
    return process.communicate()[1]


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    folder = tmp_path / ".snakemake/locks"
    folder.mkdir(parents=True)
    (folder / "0.output.lock").write_text("results/x")
    return folder


def test_leftovers_of_a_killed_run_go(tmp_path: Path, locks: Path) -> None:
    run = start("runlock.start_run()", tmp_path)
    assert not locks.exists()
    locks.mkdir()
    (locks / "0.output.lock").write_text("results/x")
    kill(run)
    kill(start("runlock.start_run()", tmp_path))
    assert not locks.exists()


@pytest.mark.parametrize("who", ["another run", "a stage that outlived its run"])
def test_locks_of_the_living_stay(tmp_path: Path, locks: Path, who: str) -> None:
    if who == "another run":
        living = start("runlock.start_run()", tmp_path)
        locks.mkdir()
        (locks / "0.output.lock").write_text("results/x")
    else:
        path = tmp_path / ".snakemake/moa-run.lock"
        living = start("runlock.hold_from_environment()", tmp_path, MOA_RUN_LOCK=str(path))
    message = kill(start("runlock.start_run()", tmp_path))
    assert (locks / "0.output.lock").exists()
    if sys.platform == "linux":
        assert str(living.pid) in message
    kill(living)
