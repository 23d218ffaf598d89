"""Data sets of the hub, or in a folder, through `datasets`: the bytes of their images, undecoded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moa.data.errors import DataError
from moa.data.sources.config import PhotosConfig


def commit(config: PhotosConfig, locked: str) -> str:
    """The commit that is read: "" of a folder, that of the lock, or what the hub says `revision` is now.

    Raises DataError if the settings ask for another commit than the lock, or the hub cannot be asked.
    """
    if Path(config.path).is_dir():
        return ""
    wanted = config.revision or "main"
    if re.fullmatch("[0-9a-f]{40}", wanted):
        if locked and locked != wanted:
            raise DataError(
                f"data.photos.revision is {wanted}, but {config.lock} was made from {locked}; put the old "
                "one back, or run `python -m moa lock-photos --accept`"
            )
        return wanted
    return locked or _ask(config.path, wanted)


def _ask(name: str, revision: str) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:  # offline, unknown, gated: each raises its own
        raise DataError(
            f"data.photos: {name!r} is no folder, and the hub does not say which commit {revision!r} "
            f"is ({type(error).__name__}: {error}); correct the path, go online once, or write the commit "
            "as data.photos.revision"
        ) from error


def load(config: PhotosConfig, revision: str) -> Any:
    """The data set's split, its images as bytes or paths. Raises DataError naming the key."""
    import datasets

    folder = Path(config.path)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(config.path)
            loaded = loaded[config.dataset_split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(config.path, split=config.dataset_split, revision=revision or None)
    except Exception as error:  # the library raises anything
        raise DataError(
            f"data.photos: {config.path!r}, split {config.dataset_split!r}, cannot be loaded "
            f"({type(error).__name__}: {error}); correct path, revision or dataset_split"
        ) from error
    for key in ("image_column", "id_column"):
        column = getattr(config, key)
        if column and column not in loaded.column_names:
            raise DataError(f"data.photos.{key}: there is no {column!r} among {loaded.column_names}")
    if not isinstance(loaded.features[config.image_column], datasets.Image):
        raise DataError(f"data.photos.image_column: {config.image_column!r} holds no images")
    return loaded.cast_column(config.image_column, datasets.Image(decode=False))


def read(loaded: Any, row: int, config: PhotosConfig) -> bytes:
    """The bytes of a row's image as they were put in; b"" if there are none."""
    image = loaded[row][config.image_column] or {}
    if image.get("bytes"):
        return bytes(image["bytes"])
    path = image.get("path")
    return Path(path).read_bytes() if path and Path(path).is_file() else b""
