"""One of several GPUs for each process of a machine.

`snakemake --resources gpu=4` runs four jobs at once, which all say `device: cuda`: `take_one` lets each see
another GPU. A lock on a file says who has one, so a killed process gives it back.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from itertools import count
from pathlib import Path
from typing import IO

HELD: list[IO[str]] = []  # locked until this process ends


def visible() -> list[str]:
    """The GPUs that this process may use, as $CUDA_VISIBLE_DEVICES names them."""
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    if stated is not None:
        return [name.strip() for name in stated.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def take_one() -> None:
    """Let this process, and those that it starts, see one GPU: of those that fewest others took, the first.

    Nothing is done where there are no several, or behind a launcher that gives its processes GPUs itself
    ($LOCAL_RANK). To be called before CUDA is used. Processes of other users are not known.
    """
    names = visible()
    if len(names) < 2 or "LOCAL_RANK" in os.environ:
        return
    folder = Path(tempfile.gettempdir()) / f"moa-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    with (folder / "choosing").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # one process at a time, or counting would look like holding
        name = min(names, key=lambda name: _taken(folder, name))
        HELD.append(next(file for place in count() if (file := _lock(folder / f"{name}-{place}"))))
    os.environ["CUDA_VISIBLE_DEVICES"] = name


def _taken(folder: Path, name: str) -> int:
    """How many processes share a GPU."""
    files = [_lock(path) for path in folder.glob(f"{name}-*")]
    for file in files:
        if file:
            file.close()
    return files.count(None)


def _lock(path: Path) -> IO[str] | None:
    """A file that stays locked until it is closed; None if another process has it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
