"""After a SIGKILL the same command goes on; while something lives, its locks are respected."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moa import runlock
from moa.hashing import ROOT
from moa.training.checkpoint import locked

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


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has none, as NFS without its lock daemon."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    for name in (runlock.VARIABLE, "PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # to be put back


@pytest.mark.usefixtures("no_locks")
def test_a_run_goes_on_without_locks_and_clears_none(
    tmp_path: Path, locks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runlock.start_run(tmp_path / ".snakemake")
    said = capsys.readouterr().err
    assert f"{tmp_path / '.snakemake'} lies on a file system without locks (No locks available)" in said
    assert (locks / "0.output.lock").exists()
    runlock.hold_from_environment()  # a stage of it
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("no_locks")
def test_a_training_goes_on_without_locks(tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match=r"run lies on a file system without locks"),
        locked(tmp_path / "run"),
    ):
        assert (tmp_path / "run/lock").read_text() == str(os.getpid())


def test_a_training_that_another_process_has_is_refused(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(RuntimeError, match=rf"held by process {os.getpid()}, "),
        locked(tmp_path),
    ):
        pass
