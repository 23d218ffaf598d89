"""`--use-conda`: Snakemake makes the environments from their files, and every job runs in that of its rule.

conda itself is on no index that this project is installed from; `conda/bin/conda` stands in for it. What it
cannot tell is whether conda-forge has packages within the bounds.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from moa.hashing import ROOT
from tests.workflow.conftest import Run

STAND_IN = ROOT / "tests/workflow/conda/bin"
REDUCED = ["--configfile", "tests/workflow/reduced.yaml"]
TARGETS = [
    "results/reduced/data/raw/validation-000.parquet",
    "results/reduced/requests/test-single-000.parquet",
]


def jobs(said: str) -> dict[str, str]:
    """How many jobs there are of each rule."""
    return dict(re.findall(r"^(\w+) +(\d+)$", said, re.MULTILINE))


@pytest.fixture
def with_conda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{STAND_IN}:{os.environ['PATH']}")
    monkeypatch.setenv("MOA_PYTHON", sys.executable)


@pytest.mark.usefixtures("with_conda")
def test_the_main_job_is_the_same_with_environments(snakemake: Run) -> None:
    plain, with_environments = (snakemake("--dry-run", *flag, *REDUCED) for flag in ([], ["--use-conda"]))
    assert plain.returncode == with_environments.returncode == 0, with_environments.stderr
    assert jobs(plain.stdout) == jobs(with_environments.stdout) != {}


@pytest.mark.usefixtures("with_conda")
def test_jobs_run_in_the_environments_of_their_rules(snakemake: Run, project: Path) -> None:
    done = snakemake("--cores", "1", "--use-conda", *REDUCED, "--", *TARGETS)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = {}
    for prefix in (folder for folder in (project / ".snakemake/conda").iterdir() if folder.is_dir()):
        made_from = yaml.safe_load(prefix.with_name(f"{prefix.name}.yaml").read_text())
        (name,) = [
            f.stem for f in (ROOT / "envs").glob("*.yaml") if yaml.safe_load(f.read_text()) == made_from
        ]
        ran[name] = [line.split()[2] for line in (prefix / "ran").read_text().splitlines()]
    assert set(ran["miniature"]) == {"render", "render-subjects"}
    assert set(ran["models"]) == {"plan"}


def test_without_conda_the_error_is_snakemakes(
    snakemake: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for command in ("bash", "git", "sh"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / command).symlink_to(str(shutil.which(command)))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    done = snakemake("--cores", "1", "--use-conda", *REDUCED, "--", TARGETS[0])
    assert done.returncode != 0
    said = "Is conda installed and accessible?"
    assert said in done.stdout + done.stderr
    assert said in (ROOT / "README.md").read_text()
