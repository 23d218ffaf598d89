"""Fixtures of the evaluation's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evaluation_fakes import COLORS, people
from PIL import Image

from moa.data.records import SUBJECT, encode_image, write_rows


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def subjects_file(tmp_path: Path) -> Path:
    """A subjects table whose photos are flat colours."""
    rows = [
        {
            "id": p.id,
            "identity": p.id,
            "word": p.word,
            "image": encode_image(Image.new("RGB", (16, 16), color)),
            "sha256": "",
        }
        for p, color in zip(people(), COLORS, strict=True)
    ]
    write_rows(tmp_path / "subjects.parquet", rows, SUBJECT)
    return tmp_path / "subjects.parquet"
