"""What of a run is kept for others to read: made.json, which says how it was made; a copy without images.

Entry points, called by `python -m moa provenance` and `python -m moa ship`:

    provenance(results, files, config, command, output)  rule `made`, after everything else
    ship(results, output)                                by hand: `python -m moa ship --results results/full`
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from moa import versions
from moa.files import write_atomically
from moa.hashing import file_hash

FOLDERS = ("tables", "figures", "scores", "router", "ablations")  # of what is shipped; replaced there


def provenance(results: Path, files: Sequence[Path], config: str, command: str, output: Path) -> None:
    """Write what made a run, as JSON.

    commit: of the sources, null outside of git; changed: files of them that differ from it; seconds: wall
    time of the jobs by rule, of which several ran side by side; config: the whole configuration; files: the
    SHA-256 of what is shipped, by its path below `results`.

    Args:
        results: folder of a run.
        files: of it, those to be shipped.
        config: its whole configuration as JSON.
        command: what makes it again; settings that were typed after `--config` stand in the configuration.
        output: file to write.
    """
    about = {
        "command": command,
        "commit": versions.commit(),
        "changed": versions.changed(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": versions.packages(),
        "seconds": seconds_of_jobs(results / "benchmarks"),
        "files": {path.relative_to(results).as_posix(): file_hash(path) for path in sorted(files)},
        "config": json.loads(config),
    }
    text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    write_atomically(output, lambda part: part.write_text(text, encoding="utf-8"))


def seconds_of_jobs(benchmarks: Path) -> dict[str, float]:
    """Wall time of a run's jobs by rule, from Snakemake's benchmark files; `total` is their sum."""
    spent: dict[str, float] = {}
    for path in sorted(benchmarks.rglob("*.tsv")):
        rule = path.relative_to(benchmarks).parts[0].removesuffix(".tsv")
        head, *rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
        spent[rule] = spent.get(rule, 0.0) + sum(float(row[head.index("s")]) for row in rows)
    return {rule: round(value, 1) for rule, value in {**spent, "total": sum(spent.values())}.items()}


def ship(results: Path, output: Path = Path("docs/results")) -> None:
    """Copy what a run's made.json names: tables, figures, samples and measures; no images, weights or data.

    Args:
        results: folder of a run that is whole, with its made.json.
        output: folder to copy to; its tables, figures and measures are replaced, other files stay.

    Raises:
        FileNotFoundError: the run is not whole. ValueError: a file is not the one that made.json names.
    """
    cure = "let the run end first (`snakemake --cores all full`)"
    made = results / "made.json"
    for path in (made, *(results / name for name in named(made))):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {cure}")
    for name, wanted in named(made).items():
        if file_hash(results / name) != wanted:
            raise ValueError(f"{results / name} was made after {made}: {cure}")
    for folder in FOLDERS:
        shutil.rmtree(output / folder, ignore_errors=True)
    for name in (made.name, *named(made)):
        copy(results / name, output / name)


def named(made: Path) -> dict[str, str]:
    """SHA-256 of the files that made.json names, by their paths; none if it is not there."""
    return dict(json.loads(made.read_text(encoding="utf-8"))["files"]) if made.is_file() else {}


def copy(path: Path, to: Path) -> None:
    """Copy a file, into folders that need not be there."""
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)
