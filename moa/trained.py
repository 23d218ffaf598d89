"""Whose weights each method uses. Imports nothing heavy, for the workflow reads it too."""

from __future__ import annotations

from pathlib import Path

TRAINED = {"moa": "moa", "moa_wrong_subject": "moa", "fastcomposer": "fastcomposer"}  # method: training


def trained_folder(results: Path, method: str) -> Path | None:
    """Where a run leaves the weights that `method` uses; None if it uses none."""
    return results / "train" / TRAINED[method] if method in TRAINED else None
