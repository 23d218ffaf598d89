"""Whose weights each method uses. Imports nothing heavy, for the workflow reads it too."""

from __future__ import annotations

from pathlib import Path

TRAINED = {  # method: training
    "moa": "moa",
    "moa_wrong_subject": "moa",
    "fastcomposer": "fastcomposer",
    "textual_inversion": "textual_inversion",
}
# Trainings that see the photo of each subject of the protocol, and no records.
PER_SUBJECT = frozenset({"textual_inversion"})


def trained_folder(results: Path, method: str) -> Path | None:
    """Where a run leaves the weights that `method` uses; None if it uses none."""
    return results / "train" / TRAINED[method] if method in TRAINED else None
