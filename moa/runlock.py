"""Who is alive in a working folder: what lets the same command go on after a SIGKILL.

Snakemake leaves its own lock files behind when it is killed, and then refuses to start. Here every run, and
every stage that a run starts, holds a shared `flock` on one file; the kernel drops it when the process ends,
however it ends. A run that can get the exclusive lock therefore knows that whatever lock files lie there are
leftovers.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

VARIABLE = "MOA_RUN_LOCK"  # tells stages the lock file of the run that started them
_held: list[IO[str]] = []  # open until the process ends


def hold(path: Path) -> None:
    """Hold the shared lock on `path` until this process ends; waits only for another run's clean-up.

    Where the file system has no locks nothing is held, and `start_run` has said so.
    """
    file = path.open("a")
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH)
    _held.append(file)


def hold_from_environment() -> None:
    """Hold the lock of the run that started this stage; by hand, without a run, there is none."""
    if path := os.environ.get(VARIABLE):
        hold(Path(path))


def holders(path: Path) -> list[int]:
    """Process ids that hold the lock, as Linux tells them; empty elsewhere."""
    locks = Path("/proc/locks")
    if not locks.exists():
        return []
    inode = f":{path.stat().st_ino}"
    rows = [line.split() for line in locks.read_text().splitlines() if " FLOCK " in line and "->" not in line]
    return sorted({int(row[4]) for row in rows if row[5].endswith(inode)})


def start_run(state: Path = Path(".snakemake")) -> None:
    """Clear the lock files of a dead run, if nothing of it lives, and hold the lock for this one.

    Also puts this interpreter's folder first on PATH, so that rules find the same `python`.
    """
    state.mkdir(exist_ok=True)
    path, locks = (state / "moa-run.lock").resolve(), state / "locks"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(locks, ignore_errors=True)
        except BlockingIOError:
            if any(locks.glob("*.lock")):
                _warn_of(holders(path))
        except OSError as error:
            sys.stderr.write(
                f"{state.resolve()} lies on a file system without locks ({error.strerror}): see to it that "
                "only one run is at work in this folder. If Snakemake says that it is locked after a kill: "
                "`snakemake --unlock`.\n"
            )
    hold(path)
    os.environ[VARIABLE] = str(path)
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])


def _warn_of(processes: list[int]) -> None:
    """Say which processes keep the folder busy, before Snakemake says that it is locked."""
    names = ", ".join(map(str, processes)) or "unknown"
    sys.stderr.write(
        f"Another run, or a job that outlived one, is at work in this folder (process {names}). If Snakemake "
        "says that the folder is locked: wait until they end, or end them, then repeat the command.\n"
    )
