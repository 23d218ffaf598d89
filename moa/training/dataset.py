"""Training records as batches, with all chance keyed by (seed, global sample index).

The global sample index counts samples over the whole run: step × batch size + place in the batch. What a
sample shows, its noise, timestep, drop and augmentation follow from the index alone, so a resumed run and a
run on several processes see exactly what one unbroken process sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from moa.data import records
from moa.data.crops import CropConfig, middle_square, subject_image, subject_masks
from moa.data.errors import DataError
from moa.files import write_atomically
from moa.machine import forked
from moa.training.config import TrainConfig

TokenFinder = Callable[[str, Sequence[tuple[int, int]]], Sequence[int]]  # prompt, spans -> token indices


def keyed_seed(*parts: int | str) -> int:
    """A seed in 0..2**63-1 from SHA-256 over the parts: unlike sums, no two keys share one by design."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def keyed_generator(*parts: int | str) -> np.random.Generator:
    """A generator that starts from `keyed_seed`."""
    return np.random.default_rng(keyed_seed(*parts))


def keyed_noise(shape: Sequence[int], *parts: int | str) -> torch.Tensor:
    """Standard normal noise on the CPU from `keyed_seed`."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(keyed_seed(*parts)))


@dataclass(frozen=True)
class Sizes:
    """What the models want: sides in pixels, except where said otherwise."""

    image: int  # what the autoencoder sees
    latent: int  # side of a latent, latent pixels
    channels: int  # of a latent
    crop: int  # what the image encoder sees


@dataclass(frozen=True)
class Example:
    """One record, decoded."""

    id: str
    image: NDArray[np.uint8]  # [H, W, 3]
    ids: NDArray[np.int32]  # [H, W], 0 = background
    caption: str
    segments: tuple[int, ...]  # ids of the subjects, largest first
    tokens: tuple[int, ...]  # place of each subject's word in the tokenized caption


@dataclass(frozen=True)
class Batch:
    """B samples of one step; subjects are padded to the largest number S in the batch."""

    index: torch.Tensor  # [B] record numbers
    captions: list[str]  # "" where the condition is dropped
    dropped: torch.Tensor  # [B] bool
    tokens: torch.Tensor  # [B, S] int64 places of the subjects' words; 0 where there is none
    exists: torch.Tensor  # [B, S] bool: the picture has a subject s
    present: torch.Tensor  # [B, S] bool: and the model is shown its image
    masks: torch.Tensor  # [B, S, h, w] in 0..1, the subjects' shares of latent pixels
    crops: torch.Tensor  # [N, 3, side, side], 0..1, images of the present subjects
    slots: torch.Tensor  # [N, 2] int64: the sample and subject that each crop belongs to
    pixels: torch.Tensor | None  # [B, 3, H, W] in -1..1; None when latents are cached
    noise: torch.Tensor  # [B, C, h, w]
    posterior_noise: torch.Tensor  # [B, C, h, w], of the autoencoder's draw
    timesteps: torch.Tensor  # [B] int64
    masked: bool = True  # whether this step's loss looks at the subjects alone
    object_share: float = 1.0  # this part's samples with subjects, over those of a mean part of the step

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)


def square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The middle square of [H, W, 3], resized to `size` pixels."""
    middle = Image.fromarray(middle_square(image))
    same = middle.width == size
    return np.asarray(middle if same else middle.resize((size, size), Image.Resampling.LANCZOS))


COLUMNS = ["id", "image", "caption", "segments", "mask"]  # of a record, that training looks at


def arrow_copies(paths: Sequence[str | Path], folder: Path) -> list[Path]:
    """An Arrow copy of each shard in `folder`, made unless it is there: parquet cannot be memory-mapped.

    Raises DataError as `records.read_table`.
    """
    return [_arrow_copy(Path(path), folder) for path in paths]


def _arrow_copy(path: Path, folder: Path) -> Path:
    stat = path.stat() if path.is_file() else None  # if it is none, read_table says what to do
    version = keyed_seed(str(path.resolve()), stat.st_size, stat.st_mtime_ns) if stat else 0
    copy = folder / f"{path.stem}-{version:016x}.arrow"
    if not copy.is_file():
        table = records.read_table(path, records.RECORD).select(COLUMNS)
        write_atomically(copy, lambda part: _write_arrow(table, part))
    return copy


def _write_arrow(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def read_records(paths: Sequence[str | Path], scratch: Path | None) -> pa.Table:
    """The `COLUMNS` of all shards: in memory, or mapped from `arrow_copies` in the folder `scratch`.

    A mapped table's pages are read when they are used, and shared by all processes of a machine.
    """
    if scratch is None:
        tables = [records.read_table(path, records.RECORD).select(COLUMNS) for path in paths]
    else:
        maps = [pa.memory_map(str(copy)) for copy in arrow_copies(paths, scratch)]
        tables = [pa.ipc.open_file(one).read_all() for one in maps]
    return pa.concat_tables(tables)


class Records(Dataset[dict[str, Any]]):
    """Records by global sample index: decoded in memory if `config.cache`, else when they are drawn."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        config: TrainConfig,
        sizes: Sizes,
        find_tokens: TokenFinder,
        scratch: Path | None = None,
    ) -> None:
        """Read the shards; every caption must have its subject words, and every subject its mask.

        Without `config.cache` the masks are looked at when they are drawn, and so are the words of a record
        of more than `max_subjects` subjects, of whom the masks choose.

        scratch: folder for the Arrow copies that records are mapped from without `config.cache`; None keeps
            them in memory.

        Raises:
            DataError: naming file or record, for a missing or broken shard, no records at all, a record
                without subjects, a word that is not in its caption, or a subject without a mask.
        """
        self.config, self.sizes, self.find_tokens = config, sizes, find_tokens
        self.table = read_records(paths, None if config.cache else scratch)
        if not len(self.table):
            raise DataError(
                f"no training records in {', '.join(map(str, paths))}; check data.* in the config"
            )
        self.crop = CropConfig(
            size=sizes.crop, subject_background=config.subject_background, flip=config.flip,
            rotate=config.rotate, zoom=config.zoom, brightness=config.brightness,
        )  # fmt: skip
        self.counts = [self._check_words(row) for row in self._texts()]
        self.examples = [self._decode(self.row(n)) for n in range(len(self))] if config.cache else None
        if self.examples is not None:
            self.table = self.table.slice(0, 0)

    def __len__(self) -> int:
        return len(self.counts)

    def row(self, number: int) -> records.Row:
        """A record as it stands in its shard: its `COLUMNS`."""
        return self.table.slice(number, 1).to_pylist()[0]

    def _texts(self) -> Iterator[records.Row]:
        for batch in self.table.select(["id", "caption", "segments"]).to_batches():
            yield from batch.to_pylist()

    def _check_words(self, row: records.Row) -> int:
        """How many subjects of a record are shown; raises DataError if it has none, or a word is amiss."""
        segments, limit = row["segments"], self.config.max_subjects
        if not segments:
            raise DataError(
                f"record {row['id']} ({row['caption']!r}) has no subject; leave it out of the records"
            )
        if len(segments) <= limit:
            self._places(row, segments)
        return min(len(segments), limit)

    def _places(self, row: records.Row, segments: Sequence[records.Row]) -> tuple[int, ...]:
        """Places of the segments' words in the tokenized caption."""
        try:
            found = self.find_tokens(row["caption"], [(s["start"], s["end"]) for s in segments])
        except ValueError as error:
            raise DataError(f"record {row['id']}: {error}") from error
        return tuple(int(token) for token in found)

    def example(self, number: int) -> Example:
        """Record by number, 0 <= number < len."""
        return self.examples[number] if self.examples is not None else self._decode(self.row(number))

    def _decode(self, row: records.Row) -> Example:
        ids = records.decode_mask(row["mask"])
        image = np.asarray(records.decode_image(row["image"]))
        if image.shape[:2] != ids.shape:
            raise DataError(
                f"record {row['id']}: mask is {ids.shape}, image {image.shape[:2]}; make it again"
            )
        seen, areas = np.unique(middle_square(ids), return_counts=True)
        area = dict(zip(seen.tolist(), areas.tolist(), strict=True))
        chosen = sorted(row["segments"], key=lambda s: -area.get(s["segment_id"], 0))[
            : self.config.max_subjects
        ]
        for segment in chosen:
            if segment["segment_id"] not in area:
                raise DataError(
                    f"record {row['id']}: subject {segment['word']!r} has no pixel in the mask's middle "
                    "square; make the records again with the stage align, which leaves such photos out"
                )
        return Example(
            id=row["id"], image=image, ids=ids, caption=row["caption"],
            segments=tuple(s["segment_id"] for s in chosen), tokens=self._places(row, chosen),
        )  # fmt: skip

    def number(self, index: int) -> int:
        """The record shown at a global sample index: a new shuffle each time all records were shown."""
        epoch, place = divmod(index, len(self))
        return int(_order(self.config.seed, epoch, len(self))[place])

    def drops(self, index: int, subjects: int) -> tuple[bool, NDArray[np.bool_]]:
        """Whether the sample loses its condition, and which of its subjects keep their images, [S]."""
        draw = keyed_generator(self.config.seed, index, "drop").random(1 + self.config.max_subjects)
        dropped = bool(draw[0] < self.config.p_drop)
        return dropped, (draw[1 : 1 + subjects] < self.config.keep_object) & (not dropped)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample at a global index, before batching."""
        seed, sizes, number = self.config.seed, self.sizes, self.number(index)
        example = self.example(number)
        dropped, kept = self.drops(index, len(example.segments))
        augmentation = keyed_generator(seed, index, "augmentation")
        crops = [
            subject_image(example.image, example.ids == segment, self.crop, augmentation)
            for segment, keep in zip(example.segments, kept, strict=True)
            if keep
        ]
        shape = (sizes.channels, sizes.latent, sizes.latent)
        return {
            "index": number,
            "caption": "" if dropped else example.caption,
            "dropped": dropped,
            "tokens": example.tokens,
            "kept": kept,
            "masks": self._masks(number, example),
            "crops": [_unit(np.asarray(crop)) for crop in crops],
            "pixels": None if self.config.cache else self.pixels(number),
            "noise": keyed_noise(shape, seed, index, "noise"),
            "posterior_noise": keyed_noise(shape, seed, index, "posterior"),
            "timestep": self._timestep(keyed_generator(seed, index, "timestep")),
        }

    def _timestep(self, rng: np.random.Generator) -> int:
        """In [0, max_timestep): uniform, or (1 − u³) of it, u uniform (T2I-Adapter, arXiv 2302.08453)."""
        limit = self.config.max_timestep
        if self.config.timesteps == "uniform":
            return int(rng.integers(limit))
        return min(int((1 - rng.random() ** 3) * limit), limit - 1)

    def _masks(self, number: int, example: Example) -> torch.Tensor:
        size = (self.sizes.latent, self.sizes.latent)
        return torch.from_numpy(subject_masks(middle_square(example.ids), example.segments, size))

    def pixels(self, number: int) -> torch.Tensor:
        """What the autoencoder sees of a record: [3, H, W] in -1..1."""
        return _unit(square(self.example(number).image, self.sizes.image)) * 2 - 1

    def parts(self, first: int, processes: int, process: int) -> Iterator[list[int]]:
        """Global sample indices of each backward pass of one process, from step `first` on."""
        config = self.config
        size = config.part_size(processes)
        for step in range(first, config.steps):
            start = step * config.batch_size + process * config.accumulation * size
            for part in range(config.accumulation):
                yield list(range(start + part * size, start + (part + 1) * size))

    def shown(self, step: int) -> list[int]:
        """How many subjects with images each sample of a step has; the same on every process."""
        indices = range(step * self.config.batch_size, (step + 1) * self.config.batch_size)
        counts = (self.counts[self.number(i)] for i in indices)
        return [int(self.drops(i, n)[1].sum()) for i, n in zip(indices, counts, strict=True)]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return keyed_generator(seed, epoch, "order").permutation(count)


def _unit(image: NDArray[np.uint8]) -> torch.Tensor:
    """[H, W, 3] in 0..255 as [3, H, W] in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """Samples as one batch; see `Batch`."""
    subjects = max(len(s["tokens"]) for s in samples)
    tokens = torch.zeros(len(samples), subjects, dtype=torch.int64)
    exists, present = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
    masks = torch.zeros(len(samples), subjects, *samples[0]["masks"].shape[1:])
    for b, sample in enumerate(samples):
        count = len(sample["tokens"])
        tokens[b, :count] = torch.tensor(sample["tokens"])
        exists[b, :count] = True
        present[b, :count] = torch.from_numpy(sample["kept"])
        masks[b, :count] = sample["masks"]
    crops = [crop for sample in samples for crop in sample["crops"]]
    return Batch(
        index=torch.tensor([s["index"] for s in samples]),
        captions=[s["caption"] for s in samples],
        dropped=torch.tensor([s["dropped"] for s in samples]),
        tokens=tokens,
        exists=exists,
        present=present,
        masks=masks,
        crops=torch.stack(crops) if crops else torch.zeros(0, 3, 1, 1),
        slots=present.nonzero(),
        pixels=None if samples[0]["pixels"] is None else torch.stack([s["pixels"] for s in samples]),
        noise=torch.stack([s["noise"] for s in samples]),
        posterior_noise=torch.stack([s["posterior_noise"] for s in samples]),
        timesteps=torch.tensor([s["timestep"] for s in samples]),
    )


def batches(data: Records, first: int, processes: int, process: int) -> Iterator[Batch]:
    """One process's parts of all steps from `first` on, `config.accumulation` of them a step."""
    config = data.config
    loader = DataLoader(
        data,
        batch_sampler=list(data.parts(first, processes, process)),
        collate_fn=collate,
        **forked(config.workers),
        generator=torch.Generator(),  # its own: the loader draws a seed that nothing here uses
    )
    parts = processes * config.accumulation
    for count, batch in enumerate(loader):
        step = first + count // config.accumulation
        shown = sum(n > 0 for n in data.shown(step))
        here = int(batch.present.any(1).sum())
        masked = keyed_generator(config.seed, step, "masked").random() < config.masked_probability
        yield replace(batch, masked=bool(masked), object_share=here * parts / shown if shown else 0.0)
