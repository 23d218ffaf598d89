"""Data sets of the hub, or in a folder, through `datasets`: the bytes of their images, undecoded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from moa.data.errors import DataError
from moa.data.sources.config import PhotosConfig
from moa.data.sources.listing import escaped, leads_out


class LeadsOut(Exception):
    """A row names a file of this machine that is no part of the data set."""


def asked(config: PhotosConfig) -> str:
    """What is asked of the hub: a commit, branch or tag; "" of a folder, which the hub knows nothing of."""
    return "" if Path(config.path).is_dir() else config.revision or "main"


def commit(config: PhotosConfig, locked: str, before: str) -> str:
    """The commit that is read: "" of a folder, that of the lock, or what the hub says `revision` is now.

    Args:
        locked: the lock's commit, and
        before: what was asked for when the lock was made; "" without a lock.

    Raises DataError if the settings ask for anything else than the lock, or the hub cannot be asked.
    """
    wanted = asked(config)
    if not wanted:
        return ""
    if locked and wanted not in (locked, before):
        raise DataError(
            f"{config.key}.revision is {wanted}, but {config.lock} was made from {locked} ({before}); put "
            f"the old one back, or run `python -m moa {config.stage} --accept`"
        )
    return locked or (wanted if re.fullmatch("[0-9a-f]{40}", wanted) else _ask(config, wanted))


def _ask(config: PhotosConfig, revision: str) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(config.path, revision=revision).sha)
    except Exception as error:  # offline, unknown, gated: each raises its own
        raise DataError(
            f"{config.key}: {config.path!r} is no folder, and the hub does not say which commit {revision!r} "
            f"is ({type(error).__name__}: {error}); correct the path, go online once, or write the commit "
            f"as {config.key}.revision"
        ) from error


def _snapshot(config: PhotosConfig, revision: str) -> Path:
    """The folder of a commit in the hub's cache, whole; what is missing there is fetched.

    Raises DataError naming the key, if that cannot be had or told, and for a data set that a script loads.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download

    try:
        folder = Path(snapshot_download(config.path, repo_type="dataset", revision=revision))
        # Offline, nobody could say without this list whether a file is missing from the folder.
        get_cached_repo_tree(config.path, repo_type="dataset", revision=revision)
    except Exception as error:  # offline, unknown, gated, a full disk: each raises its own
        raise DataError(
            f"{config.key}: commit {revision} of the data set {config.path!r} is not in the hub's cache as a "
            f"whole and cannot be fetched ({type(error).__name__}: {error}); go online once, or correct path "
            "or revision"
        ) from error
    if folder.name != revision:
        raise DataError(
            f"{config.key}: {revision!r} is no commit of {config.path!r} (it led to {folder}); take the lock "
            f"{config.lock} from your backup"
        )
    script = folder / f"{config.path.rpartition('/')[2]}.py"
    if script.is_file():
        raise DataError(
            f"{config.key}: {config.path!r} has a loading script, {script.name}, and `datasets` runs none; "
            "give a revision without one, such as refs/convert/parquet where the hub keeps that, or a folder"
        )
    return folder


def _split(folder: Path, split: str) -> Any:
    """A split of the data set in a folder, "all" for all of them, whatever wrote it there.

    Raises ValueError for a single one that says it is another; one that says nothing counts as any.
    """
    import datasets

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        loaded = datasets.load_from_disk(str(folder))
        if isinstance(loaded, datasets.DatasetDict):
            return datasets.concatenate_datasets(list(loaded.values())) if split == "all" else loaded[split]
        if loaded.split is not None and str(loaded.split) != split != "all":
            raise ValueError(f"it is the split {str(loaded.split)!r}")
        return loaded
    return datasets.load_dataset(os.path.abspath(folder), split=split)  # `csv` alone would be no folder


def load(config: PhotosConfig, revision: str) -> Any:
    """The data set's split: images, as bytes or paths, and ids.

    It is always read from a folder, for `datasets` answers the name of one on the hub with any commit in its
    cache where the hub is out of reach. Raises DataError naming the key.

    Args:
        revision: the commit of one on the hub, 40 hexadecimal digits; "" of a folder.
    """
    import datasets

    folder = _snapshot(config, revision) if revision else Path(config.path)
    if not folder.is_dir():
        raise DataError(f"{config.key}.path: there is no folder {folder}; put it back or correct it")
    try:
        loaded = _split(folder, config.dataset_split)
    except Exception as error:  # the library raises anything
        raise DataError(
            f"{config.key}: {config.path!r}, split {config.dataset_split!r}, cannot be loaded "
            f"({type(error).__name__}: {error}); correct path, revision or dataset_split"
        ) from error
    for key in ("image_column", "id_column"):
        column = getattr(config, key)
        if column and column not in loaded.column_names:
            raise DataError(f"{config.key}.{key}: there is no {column!r} among {loaded.column_names}")
    if not isinstance(loaded.features[config.image_column], datasets.Image):
        raise DataError(f"{config.key}.image_column: {config.image_column!r} holds no images")
    used = loaded.select_columns([c for c in (config.image_column, config.id_column) if c])
    return used.cast_column(config.image_column, datasets.Image(decode=False))


def _places(config: PhotosConfig) -> list[str]:
    """Folders that a data set's files may lie in: its own, and the caches of the hub."""
    import datasets
    from huggingface_hub import constants

    known = datasets.config
    caches = known.HF_DATASETS_CACHE, known.DOWNLOADED_DATASETS_PATH, known.EXTRACTED_DATASETS_PATH
    own = [config.path] if Path(config.path).is_dir() else []
    return [os.path.realpath(folder) for folder in (*own, *caches, constants.HF_HUB_CACHE)]


def read(loaded: Any, row: int, config: PhotosConfig) -> bytes:
    """The bytes of a row's image as they were put in; b"" if there are none.

    Raises LeadsOut for a path that is neither the data set's nor in a cache: a row could name any file.
    """
    image = loaded[row][config.image_column] or {}
    if image.get("bytes"):
        return bytes(image["bytes"])
    path = image.get("path") or ""
    if not os.path.isfile(path):
        return b""
    if all(leads_out(path, folder) for folder in _places(config)):
        raise LeadsOut(f"the row names {escaped(path)}, outside of the data set")
    return Path(path).read_bytes()
