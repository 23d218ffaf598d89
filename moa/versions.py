"""What a run was made with: the sources' commit, and the packages' versions."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version

from moa.hashing import ROOT

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "snakemake", "numpy", "pandas", "pyarrow")
SOURCES = ("Snakefile", "workflow", "config", "moa", "notebooks")  # what results depend on


def installed(package: str) -> str | None:
    """A package's version; None where it is not installed, as Snakemake is not inside a conda environment."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def packages() -> dict[str, str]:
    """The versions of those of `PACKAGES` that are installed."""
    return {name: found for name in PACKAGES if (found := installed(name))}


def commit() -> str | None:
    """The commit of the sources; None if they are in no repository, or there is no git."""
    return _git("rev-parse", "HEAD")


def changed() -> list[str]:
    """The files of `SOURCES` that differ from the commit, as git lists them; none outside of git."""
    return (_git("status", "--porcelain", "--", *SOURCES) or "").splitlines()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.rstrip("\n")
