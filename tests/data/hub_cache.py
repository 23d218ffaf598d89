"""The hub's cache, laid out by hand as `huggingface_hub` does: what lies in it needs no network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest


def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the libraries look nowhere but below `cache`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")


def add_commit(cache: Path, name: str, commit: str, files: Mapping[str, bytes]) -> Path:
    """The snapshot of a data set's newest commit: links to blobs, and the list of what belongs to it."""
    repository = cache / "hub" / f"datasets--{name.replace('/', '--')}"
    listed = {}
    for path, data in files.items():
        blob = repository / "blobs" / hashlib.sha256(data).hexdigest()
        link = repository / "snapshots" / commit / path
        for file in (blob, link):
            file.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link.symlink_to(blob)
        listed[path] = {"size": len(data), "blob_id": blob.name}
    for folder, text in (("refs/main", commit), (f"trees/{commit}.json", tree(listed))):
        (repository / folder).parent.mkdir(parents=True, exist_ok=True)
        (repository / folder).write_text(text)
    return repository / "snapshots" / commit


def tree(listed: Mapping[str, Mapping[str, object]]) -> str:
    return json.dumps({"format_version": 1, "files": listed})
