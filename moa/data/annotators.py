"""What the caption and segment stages share: loading a model, and going through the photos in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from PIL import Image
from tqdm import tqdm

from moa.data.errors import BrokenImage, DataError
from moa.data.records import Row, decode_image
from moa.hashing import model_hash
from moa.methods import ModelSource

Precision = Literal["no", "fp16", "bf16"]
Found = TypeVar("Found")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load(loader: Any, source: ModelSource, role: str, **options: Any) -> Any:
    """`loader.from_pretrained` of a model's folder or hub id; `role` its key in the config, below `models`.

    Raises DataError that names the key, the model and the cure, if it is missing, damaged or of another kind.
    """
    key = role if "." in role else f"models.{role}"
    try:
        return loader.from_pretrained(source.id, revision=source.revision or "main", **options)
    except Exception as error:  # the libraries raise anything from OSError to SafetensorError
        raise DataError(
            f"{key}: {source.id!r} cannot be loaded ({type(error).__name__}: {error}); "
            "correct its id or revision, or make the folder again"
        ) from error


def revision(source: ModelSource, model: Any) -> str:
    """What a row records as the model's revision: a local folder's content hash, or the hub's commit."""
    folder = Path(source.id)
    if not folder.is_dir():
        return str(getattr(model.config, "_commit_hash", None) or source.revision or "main")
    return f"sha256:{model_hash(folder)[:16]}"


def check_positive(config: Any, *names: str) -> None:
    """Raise ValueError naming the key unless these settings are at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")


def annotate(
    model: Callable[[Sequence[Image.Image]], Sequence[Found]], rows: Sequence[Row], size: int, title: str
) -> tuple[dict[str, Found], dict[str, str]]:
    """What a model says of each photo, `size` at a time, and why a photo could not be read, both by id."""
    found: dict[str, Found] = {}
    problems: dict[str, str] = {}
    for batch, images in batches(rows, size, problems, title):
        found |= zip((row["id"] for row in batch), model(images), strict=True)
    return found, problems


def batches(
    rows: Sequence[Mapping[str, Any]], size: int, problems: dict[str, str], title: str
) -> Iterator[tuple[list[Row], list[Image.Image]]]:
    """Decode photos and hand them out in batches of equal pixel size; broken ones go to `problems` by id.

    Equal sizes need no padding, so that a photo's annotation does not depend on its neighbours. Photos are
    decoded when their batch is due; the header alone decides the batch.
    """
    waiting: dict[tuple[int, int], tuple[list[Row], list[Image.Image]]] = {}
    with tqdm(total=len(rows), desc=title, unit="image") as bar:
        for row in rows:
            try:
                image = decode_image(row["image"])
            except BrokenImage as error:
                problems[row["id"]] = f"broken_image: {error}"
                bar.update()
                continue
            batch = waiting.setdefault(image.size, ([], []))
            batch[0].append(dict(row))
            batch[1].append(image)
            if len(batch[0]) == size:
                yield waiting.pop(image.size)
                bar.update(size)
        for batch in waiting.values():
            yield batch
            bar.update(len(batch[0]))
