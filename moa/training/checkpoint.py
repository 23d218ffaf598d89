"""Checkpoints that a kill at any moment cannot break: written aside, then renamed; safetensors and JSON only.

A run's folder is keyed by everything that its result depends on, so a changed config starts anew, and holds a
lock that the system lets go of when its process dies, however it dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

STEP_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """Everything from which training goes on as if it had never stopped."""

    step: int  # steps done
    weights: dict[str, torch.Tensor]  # trained parameters by name
    average: dict[str, torch.Tensor]  # their running means (EMA); empty when there is none
    optimizer: dict[str, torch.Tensor]  # "<parameter>.<entry>", such as "0.exp_avg"
    state: dict[str, Any]  # JSON: elapsed seconds, rows of the log, open sums


def key(**parts: Any) -> str:
    """Twelve hexadecimal digits that change with any part; parts are JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel frees it when the holder ends, killed or not.

    A file system without locks is a warning, and the run goes on.

    Raises:
        RuntimeError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RuntimeError(
                f"{path} is held by process {file.read().strip() or '?'}, which trains the same thing: "
                "wait for it, or end it"
            ) from error
        except OSError as error:  # such as ENOLCK
            warnings.warn(
                f"{folder} lies on a file system without locks ({error.strerror}): see to it that no other "
                "process trains the same thing",
                stacklevel=3,
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def replace_folder(new: Path, target: Path) -> None:
    """Put folder `new` in the place of `target`, which may exist; both on one file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint and delete all but the newest `keep`. Returns its folder."""
    target = folder / f"step-{checkpoint.step:08d}"
    part = folder / f".{target.name}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in ("weights", "average", "optimizer"):
        tensors: Mapping[str, torch.Tensor] = getattr(checkpoint, name)
        save_file(
            {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
            part / f"{name}.safetensors",
        )
    (part / "state.json").write_text(json.dumps({"step": checkpoint.step} | checkpoint.state))
    replace_folder(part, target)
    for stale in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{stale:08d}", ignore_errors=True)
    for left in folder.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
    return target


def steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder, rising."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for p in folder.iterdir() if (m := STEP_FOLDER.fullmatch(p.name)))


def load(folder: Path) -> Checkpoint:
    """Read one checkpoint folder. Raises ValueError naming the file when it is broken."""
    try:
        state = json.loads((folder / "state.json").read_text())
        tensors = {
            name: load_file(folder / f"{name}.safetensors") for name in ("weights", "average", "optimizer")
        }
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder} is broken ({error}); delete it and start again") from error
    return Checkpoint(step=state.pop("step"), state=state, **tensors)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint's folder, or None when there is none."""
    found = steps(folder)
    return folder / f"step-{found[-1]:08d}" if found else None


def find(folder: Path, resume: str) -> Path | None:
    """The checkpoint that a run in `folder` begins with; None to begin anew.

    resume: "latest", the newest in `folder`, if there is one; "none"; the name of one in `folder`; or the
        path of a checkpoint, or of a folder of them, whose newest counts.

    Raises FileNotFoundError if there is no such checkpoint.
    """
    if resume == "none":
        return None
    if resume == "latest":
        return latest(folder)
    for path in (folder / resume, Path(resume)):
        if STEP_FOLDER.fullmatch(path.name) and path.is_dir():
            return path
        if newest := latest(path):
            return newest
    known = ", ".join(f"step-{step:08d}" for step in steps(folder)) or "none yet"
    raise FileNotFoundError(
        f"--resume {resume}: no such checkpoint; give `latest`, `none`, the path of a folder named step-… or "
        f"of one that holds some, or the name of a checkpoint of this run ({known})"
    )


def inside(found: Path, folder: Path) -> bool:
    """Whether a checkpoint lies in a run's folder."""
    return found.parent.resolve() == folder.resolve()


def own_folder(folder: Path, resume: str) -> tuple[Path, str]:
    """The folder of a run and what it begins with there, for a run that would save into `folder`.

    A run that begins with another run's checkpoint gets a folder of its own, named after the given path: a
    killed one goes on there, whatever became of that checkpoint, and the run without it never takes these
    checkpoints for its own. Raises FileNotFoundError as `find`.
    """
    if resume in ("latest", "none") or (Path(resume).name == resume and (folder / resume).is_dir()):
        return folder, resume
    branch = f"{folder.name}-from-"
    own = folder.with_name(branch + key(path=str(Path(resume).resolve())))
    if latest(own):
        return own, "latest"
    found = find(folder, resume)
    assert found is not None
    if inside(found, folder):
        return folder, resume
    if inside(found.parent, folder.parent) and found.parent.name.startswith(branch):
        return found.parent, found.name
    return own, str(found)


def rewind(folder: Path, step: int) -> None:
    """Drop what a run left behind after a step: checkpoints, and validation grids."""
    for path in (*folder.glob("step-*"), *folder.glob("grids/step-*.png")):
        if int(path.stem.removeprefix("step-")) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's state as named tensors; groups' settings come from the config instead."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Undo `optimizer_tensors`."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, entry = name.split(".", 1)
        state.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
