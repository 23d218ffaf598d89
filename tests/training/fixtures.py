"""Fixtures of every test that trains: tiny models and records, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from moa.methods import ModelSource
from tests.training import tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSource, ModelSource]:
    return tiny.save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny.save_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="session")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_subjects(tmp_path_factory.mktemp("subjects") / "validation.parquet")
