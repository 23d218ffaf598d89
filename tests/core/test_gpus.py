"""Jobs that run at once must not crowd one GPU while others idle. No GPU is needed to see that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOLD = """
import os, sys
from moa import gpus
gpus.take_one()
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path: Path):
    """Start a process that takes a GPU and holds it; its process and what it sees."""
    running: list[subprocess.Popen[str]] = []

    def started(visible: str = "4,7", **environment: str) -> tuple[subprocess.Popen[str], str]:
        environment = {**os.environ, "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": visible, **environment}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", HOLD], env=environment, **pipes)
        running.append(process)
        return process, process.stdout.readline().strip()

    yield started
    for process in running:
        process.kill()
        process.communicate()


def test_jobs_that_run_at_once_see_different_gpus(start):
    assert [start()[1] for _ in range(2)] == ["4", "7"]


def test_a_killed_job_gives_its_gpu_back(start):
    first, seen = start()
    start()
    first.kill()
    first.wait()
    assert start()[1] == seen == "4"


def test_more_jobs_than_gpus_are_spread_over_them(start):
    assert [start()[1] for _ in range(5)] == ["4", "7", "4", "7", "4"]


def test_an_idle_gpu_is_taken_before_a_second_place_that_came_free(start):
    jobs = [start() for _ in range(5)]
    ended, seen = zip(jobs[0], jobs[1], jobs[3], strict=True)
    assert seen == ("4", "7", "7")  # where two jobs of the first stay
    for process in ended:
        process.kill()
        process.wait()
    assert [start()[1] for _ in range(2)] == ["7", "7"]


@pytest.mark.parametrize(
    ("visible", "environment"),
    [("3", {}), ("", {}), ("4,7", {"LOCAL_RANK": "1"})],
    ids=["one", "none", "launched"],
)
def test_what_is_chosen_already_stays(start, visible, environment):
    """By Slurm, which shows a job its GPU alone, or by Accelerate's launcher."""
    assert [start(visible, **environment)[1] for _ in range(2)] == [visible] * 2
