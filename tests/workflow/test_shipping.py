"""What is kept of a run says what made it, and holds no images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moa import shipping, versions


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as a whole run leaves it, its files empty."""
    for name in (
        "tables/main.csv",
        "tables/main.md",
        "figures/swap.png",
        "images/moa/a.png",
        "figures/maps.npy",
        "samples.parquet",
        "train/moa/adapter.safetensors",
        "benchmarks/claims.tsv",
        "benchmarks/score/moa.tsv",
    ):
        path = tmp_path / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("s\th:m:s\n1.5\t0:00:01\n" if path.suffix == ".tsv" else "")
    (tmp_path / "results/benchmarks/score/prior.tsv").write_text("s\th:m:s\n2.2\t0:00:02\n")
    return tmp_path / "results"


def write_provenance(run: Path) -> None:
    """made.json, as the workflow has it written."""
    names = ("tables/main.csv", "tables/main.md", "figures/swap.png", "samples.parquet")
    files = [run / name for name in names]
    shipping.provenance(run, files, '{"preset": "x"}', "snakemake full", run / "made.json")


def test_a_run_is_copied_without_images_and_weights(run: Path, tmp_path: Path) -> None:
    write_provenance(run)
    (run / "tables/tuning.csv").write_text("of another run, which left it here")
    kept = tmp_path / "kept"
    for old in ("tables/old.csv", "README.md"):
        (kept / old).parent.mkdir(parents=True, exist_ok=True)
        (kept / old).write_text("written by hand")
    shipping.ship(run, kept)
    names = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()}
    assert names == {
        "README.md", "made.json", "samples.parquet", "tables/main.csv", "tables/main.md", "figures/swap.png",
    }  # fmt: skip


def test_a_run_that_is_not_whole_is_not_copied(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"made\.json is missing: let the run end first"):
        shipping.ship(run, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("name", ["tables/main.csv", "samples.parquet"])
def test_a_run_that_was_begun_again_is_not_copied(run: Path, tmp_path: Path, name: str) -> None:
    """made.json is still there when Snakemake has removed, or made anew, what stands before it."""
    write_provenance(run)
    shipping.ship(run, tmp_path / "kept")
    before = {path: path.read_bytes() for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    (run / name).write_text("other numbers")
    with pytest.raises(ValueError, match=rf"{name} was made after .*made\.json: let the run end first"):
        shipping.ship(run, tmp_path / "kept")
    (run / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing: let the run end first"):
        shipping.ship(run, tmp_path / "kept")
    assert before == {path: path.read_bytes() for path in (tmp_path / "kept").rglob("*") if path.is_file()}


def test_provenance_names_command_commit_and_time(run: Path) -> None:
    write_provenance(run)
    about = json.loads((run / "made.json").read_text())
    assert (about["command"], about["config"]) == ("snakemake full", {"preset": "x"})
    assert about["commit"] == versions.commit()
    assert about["seconds"] == {"claims": 1.5, "score": 3.7, "total": 5.2}
    assert "torch" in about["packages"]
