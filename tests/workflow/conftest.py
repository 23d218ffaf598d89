"""Snakemake as a user calls it, and untrained models of the right shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from moa.hashing import ROOT

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of untrained models."""
    from moa.miniature.models import random_models

    folder = tmp_path_factory.mktemp("weights")
    random_models(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder in which the workflow can run on its own: links to the sources, results of its own."""
    for name in ("Snakefile", "workflow", "config", "envs", "profiles", "moa", "notebooks", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture
def snakemake(project: Path) -> Run:
    """Run Snakemake in `project`; `config` goes into a file that changes the miniature's."""

    def run(*arguments: str, config: dict | None = None) -> subprocess.CompletedProcess[str]:
        changes = []
        if config is not None:
            (project / "changes.yaml").write_text(yaml.safe_dump(config))
            changes = ["--configfile", "changes.yaml"]
        command = [sys.executable, "-m", "snakemake", *arguments, *changes]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)

    return run


def start(project: Path, target: str) -> subprocess.Popen[bytes]:
    """Begin to make `target` as `changes.yaml` says, one job at a time, in a process group of its own."""
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "1",
        "--configfile",
        "changes.yaml",
        "--",
        target,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (project / "snakemake.log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=project, env=environment, stdout=log, stderr=log, start_new_session=True
        )
