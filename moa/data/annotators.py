"""What the caption and segment stages share: loading a model, and going through the photos in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from moa.data.errors import BrokenImage, DataError
from moa.data.records import Row, decode_image
from moa.hashing import model_hash
from moa.machine import forked
from moa.methods import ModelSource

Precision = Literal["no", "fp16", "bf16"]
Found = TypeVar("Found", covariant=True)
T = TypeVar("T")
Prepare = Callable[[Sequence[Image.Image]], torch.Tensor]
WAITING = 8  # batches' worth of photos that wait for others whose pixels are equally large
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


def check_workers(config: Any) -> None:
    """Raise ValueError naming the key unless `workers` is at least 0."""
    if config.workers < 0:
        raise ValueError(f"workers must be at least 0, not {config.workers}")


def paired(raw: Sequence[Path], output: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Each raw shard with the table to write. Raises ValueError unless there are as many of either."""
    if len(raw) != len(output):
        raise ValueError(f"raw names {len(raw)} shards, and output {len(output)} tables: name one for each")
    return list(zip(raw, output, strict=True))


def pixel_values(processor: Any, images: Sequence[Image.Image]) -> torch.Tensor:
    """What a model sees of RGB images of one size: [images, 3, height, width]."""
    return processor(images=list(images), return_tensors="pt")["pixel_values"]


@dataclass(frozen=True)
class Batch:
    """Photos that a model sees at the same size, ready for it."""

    ids: list[str]
    sizes: list[tuple[int, int]]  # (height, width) of each photo, pixels
    pixels: torch.Tensor  # [photos, 3, height, width] of the model

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, some: slice) -> Batch:
        return Batch(self.ids[some], self.sizes[some], self.pixels[some])


def joined(parts: Sequence[Batch]) -> Batch:
    """One batch of several, in their order."""
    if len(parts) == 1:
        return parts[0]
    ids, sizes = (
        [name for part in parts for name in part.ids],
        [size for part in parts for size in part.sizes],
    )
    return Batch(ids, sizes, torch.cat([part.pixels for part in parts]))


def gathered(parts: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The same photos in batches of `size` that a model sees at one size; smaller ones where few are alike.

    Nothing is padded, so that a photo's annotation does not depend on its neighbours. Where many sizes come,
    the fullest batch does not wait any longer once `WAITING` batches' worth of photos do. Of parts, each has
    `size` photos at most.
    """
    waiting: dict[torch.Size, list[Batch]] = {}
    for part in parts:
        shape = part.pixels.shape[1:]
        whole = [*waiting.pop(shape, []), part]
        if sum(map(len, whole)) >= size:
            ready = joined(whole)
            yield ready[:size]
            whole = [ready[size:]] if len(ready) > size else []
        if whole:
            waiting[shape] = whole
        counts = {shape: sum(map(len, some)) for shape, some in waiting.items()}
        if sum(counts.values()) > WAITING * size:
            yield joined(waiting.pop(max(counts, key=counts.__getitem__)))
    yield from map(joined, waiting.values())


class Batches(Dataset[tuple[list[Batch], dict[str, str]]]):
    """Photos in parts of equal size, decoded and resized when they are asked for.

    An item is parts, several if photos are not as large as their rows say, and the problems of broken ones
    by id.
    """

    def __init__(self, rows: Sequence[Row], size: int, prepare: Prepare) -> None:
        """size: photos of a part, at most; prepare: from images to a model's pixels."""
        self.prepare = prepare
        self.groups = [
            group[start : start + size]
            for group in _grouped(rows, [(row["height"], row["width"]) for row in rows])
            for start in range(0, len(group), size)
        ]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> tuple[list[Batch], dict[str, str]]:
        photos: list[tuple[str, Image.Image]] = []
        problems: dict[str, str] = {}
        for row in self.groups[index]:
            try:
                photos.append((row["id"], decode_image(row["image"])))
            except BrokenImage as error:
                problems[row["id"]] = f"broken_image: {error}"
        parts = _grouped(photos, [(image.height, image.width) for _, image in photos])
        return [self._batch(part) for part in parts], problems

    def _batch(self, photos: Sequence[tuple[str, Image.Image]]) -> Batch:
        names, images = zip(*photos, strict=True)
        sizes = [(image.height, image.width) for image in images]
        return Batch(list(names), sizes, self.prepare(images))


def _grouped(items: Sequence[T], keys: Sequence[Any]) -> list[list[T]]:
    """Items of equal keys together, in the order in which they first come."""
    groups: dict[Any, list[T]] = {}
    for item, key in zip(items, keys, strict=True):
        groups.setdefault(key, []).append(item)
    return list(groups.values())


class Annotator(Protocol[Found]):
    """A model that says something of each photo: prepared in a worker's process, looked at in this one."""

    @property
    def prepare(self) -> Prepare: ...

    def look(self, pixels: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> Iterable[Found]: ...


def annotate(
    model: Annotator[Found], rows: Sequence[Row], size: int, workers: int, title: str
) -> Iterator[tuple[str, Found | None, str | None]]:
    """Of each photo its id, what a model says of it, and why it could not be read, in no certain order.

    The model looks at `size` photos at a time. `workers` processes decode and resize the next ones while it
    does; 0: it waits for them. What comes out is not kept here.
    """
    loader = DataLoader(Batches(rows, size, model.prepare), batch_size=None, **forked(workers))
    problems: dict[str, str] = {}

    def parts() -> Iterator[Batch]:
        for some, broken in loader:
            problems.update(broken)
            yield from some

    with tqdm(total=len(rows), desc=title, unit="image") as bar:
        for batch in gathered(parts(), size):
            for name, found in zip(batch.ids, model.look(batch.pixels, batch.sizes), strict=True):
                yield name, found, None
                bar.update()
        bar.update(len(problems))
    yield from ((name, None, problem) for name, problem in problems.items())
