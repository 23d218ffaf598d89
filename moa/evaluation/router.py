"""Where the router sends pixels: prior weights R_0 by layer and timestep while MoA generates (paper, Fig. 6).

Only the conditional half of guidance is looked at. Inside and outside are told apart by the segmenter on the
generated image, its mask dilated and averaged down to each layer's resolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from moa.attention import Recorder
from moa.baselines.moa import MoA, make
from moa.data.errors import DataError
from moa.data.records import write_rows
from moa.data.segment import SegmentConfig
from moa.data.subjects import read_subjects
from moa.evaluation import alike, samples
from moa.evaluation.context import dilate
from moa.evaluation.maps import ROUTER, Maps, Mask, SavedMaps, save_maps
from moa.evaluation.measures import MEASURE
from moa.evaluation.persons import PersonFinder
from moa.evaluation.samples import REQUEST, Row
from moa.methods import MethodConfig, ModelSource, Request, Sampling
from moa.sampling import in_batches, run


@dataclass(frozen=True)
class RouterConfig:
    """How router maps are recorded."""

    prior: ModelSource
    image_encoder: ModelSource
    segmenter: ModelSource
    sampling: Sampling = field(default_factory=Sampling)
    segmenter_label: str = "person"
    segmenter_threshold: float = 0.8  # least score of a segment
    dilation: float = 0.05  # how far masks are grown, fraction of the image's side
    kept: int = 4  # images whose maps are saved, for the figure and the notebook
    device: str = "cpu"

    def method(self, trained: Path) -> MethodConfig:
        return MethodConfig(
            self.prior, self.image_encoder, trained=trained, sampling=self.sampling, device=self.device
        )

    def persons(self) -> PersonFinder:
        config = SegmentConfig(
            self.segmenter,
            label=self.segmenter_label,
            threshold=self.segmenter_threshold,
            device=self.device,
        )
        return PersonFinder(config)


@dataclass(frozen=True)
class Recording:
    """Maps of a batch of images."""

    images: list[Image.Image]
    timesteps: list[int]  # at which the router decides, noisiest first
    maps: dict[str, Maps]  # layer: prior weight [B, timesteps, h, w], 0..1
    steps: int  # of the sampling


class MoARecorder:
    """MoA's sampler that keeps the router's weights of every step."""

    def __init__(self, moa: MoA):
        self.moa = moa

    def record(self, requests: Sequence[Request]) -> Recording:
        """Generate a batch and keep the router's weights of its conditional half, where the router decides.

        Steps that `personalize_below` leaves to the prior are not recorded. ValueError if that is all.
        """
        pipe, sampling = self.moa.pipe, self.moa.sampling
        recorder = Recorder(maps=False)
        timesteps: list[int] = []
        steps: dict[str, list[torch.Tensor]] = {}

        def keep(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            if int(timestep) < self.moa.conditioner.decides_below:
                timesteps.append(int(timestep))
                for layer, weights in recorder.router.items():
                    steps.setdefault(layer, []).append(weights[-len(requests) :].float().cpu())
            recorder.clear()
            return {}

        conditioning = self.moa.conditioner(
            [r.prompt for r in requests],
            subjects=[[s.image for s in r.subjects] for r in requests],
            spans=[list(r.spans) for r in requests],
            negative_prompts=sampling.negative_prompt,
            guidance=sampling.guidance > 1,
            recorder=recorder,
        )
        images = run(pipe, sampling, requests, **conditioning, callback_on_step_end=keep)
        if not timesteps:
            limit = self.moa.conditioner.decides_below
            raise ValueError(
                f"no step lies below personalize_below ({limit}): the router never decides; raise it, or "
                "take more steps"
            )
        shape = pipe.unet.config.sample_size
        order = [layer for layer in self.moa.adapter.sizes if layer in steps]
        maps = {layer: square(torch.stack(steps[layer], 1).numpy(), shape) for layer in order}
        return Recording(images, timesteps, maps, pipe.num_timesteps)


def square(weights: NDArray[np.float32], sample_size: int | Sequence[int]) -> Maps:
    """Weights [.., P] as maps [.., h, w] with the proportions of the latents (height, width).

    Raises ValueError if P pixels cannot have them.
    """
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    pixels = weights.shape[-1]
    h = round(math.sqrt(pixels * height / width))
    if h * round(pixels / h) != pixels:
        raise ValueError(f"{pixels} pixels do not form a map with the proportions {height} x {width}")
    return weights.reshape(*weights.shape[:-1], h, pixels // h)


def shrink(mask: Mask, size: tuple[int, int]) -> NDArray[np.float64]:
    """A mask [H, W] averaged over the cells of a coarser grid of (h, w): coverage in 0..1."""
    image = Image.fromarray(mask.astype(np.float32))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BOX), dtype=np.float64)


def inside_outside(maps: Maps, subjects: Mask) -> tuple[NDArray | None, NDArray | None]:
    """Mean prior weight in and beside the subjects.

    Args:
        maps: [steps, h, w].
        subjects: [H, W], dilated; its coverage of each of the h × w cells weighs the means.

    Returns:
        two arrays [steps]; the first is None if the mask is empty, the second if it is full.
    """
    cover = shrink(subjects, (maps.shape[1], maps.shape[2]))

    def mean(weights: NDArray[np.float64]) -> NDArray | None:
        return (maps * weights).sum(axis=(1, 2)) / weights.sum() if weights.sum() > 0 else None

    return mean(cover), mean(1 - cover)


# --- The stage --------------------------------------------------------------------------------------------


def record(
    config: RouterConfig,
    requests: Sequence[str | Path],
    subjects: str | Path,
    trained: str | Path,
    rows_out: str | Path,
    maps_out: str | Path,
    alike_out: str | Path,
) -> None:
    """Generate with MoA and write what the router did.

    Args:
        config: models and sampling.
        requests: parquet files of `REQUEST` rows, such as the validation split's single and swap kinds.
        subjects: the split's subjects file.
        trained: the folder of the trained adapter.
        rows_out: `ROUTER` rows, one an image, layer and timestep.
        maps_out: safetensors file with the maps of `config.kept` images (see `load_maps`).
        alike_out: `MEASURE` rows, one a measure and pair of images that differ in their subjects only.
    """
    rows = sorted(samples.read(requests, REQUEST), key=samples.sort_key)
    photos, moa, find = (
        read_subjects(subjects),
        MoARecorder(cast(MoA, make(config.method(Path(trained))))),
        config.persons(),
    )
    wanted = showcase(rows, config.kept)
    measured: list[Row] = []
    ours: list[alike.LayerMaps] = []  # of the layers of the losses
    kept: dict[int, tuple[Row, Recording, int, Mask]] = {}
    batches = in_batches([samples.to_request(row, photos) for row in rows], config.sampling.batch_size)
    done = 0
    with tqdm(total=len(rows), desc="record router", unit="image") as bar:
        for batch in batches:
            made = moa.record(batch)
            masks = [persons.union for persons in find(made.images)]
            for n, mask in enumerate(masks):
                row = rows[done + n]
                if done + n in wanted:
                    kept[done + n] = (row, made, n, mask)
                grown = dilate(mask, config.dilation) if mask.any() else mask
                in_losses = set(moa.moa.adapter.loss_layers)
                measured += measure(row, made, n, grown, in_losses)
                ours.append({layer: maps[n] for layer, maps in made.maps.items() if layer in in_losses})
            done += len(batch)
            bar.update(len(batch))
    write_rows(rows_out, measured, ROUTER)
    save_maps(maps_out, collect([kept[index] for index in wanted]))
    write_rows(alike_out, alike.compare(rows, ours), MEASURE)


def showcase(rows: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """Which rows' maps to keep: half of one noise and prompt with different subjects, half of another."""
    by_noise: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(rows):
        by_noise.setdefault((row["kind"], row["prompt"], row["seed"]), []).append(index)
    groups = sorted(by_noise.values(), key=lambda group: -len(group))
    half = -(-count // 2)
    chosen = [index for group in groups[:2] for index in group[:half]]
    rest = [index for group in groups for index in group if index not in chosen]
    return (chosen + rest)[:count]


def measure(
    row: Mapping[str, Any], made: Recording, n: int, subjects: Mask, in_losses: set[str]
) -> list[Row]:
    """`ROUTER` rows of image `n` of a recording; `subjects` [H, W] is dilated."""
    about = {name: row[name] for name in ("subject", "subjects", "kind", "prompt_id", "index")}
    measured = []
    for layer, maps in made.maps.items():
        inside, outside = inside_outside(maps[n], subjects)
        for step, timestep in enumerate(made.timesteps):
            values = {
                "layer": layer,
                "in_losses": layer in in_losses,
                "timestep": timestep,
                "steps": made.steps,
                "inside": None if inside is None else float(inside[step]),
                "outside": None if outside is None else float(outside[step]),
            }
            measured.append({**about, **values})
    return measured


def collect(kept: Sequence[tuple[Row, Recording, int, Mask]]) -> SavedMaps:
    """Maps of single images, given as (row, recording, place in the recording, mask), as one whole."""
    if not kept:
        raise DataError("no image to keep maps of: `kept` must be at least 1, and there must be requests")
    names = ("subject", "prompt", "prompt_id", "index", "seed")
    first = kept[0][1]
    return SavedMaps(
        images=np.stack([np.asarray(made.images[n].convert("RGB")) for _, made, n, _ in kept]),
        masks=np.stack([mask for *_, mask in kept]),
        timesteps=first.timesteps,
        maps={layer: np.stack([made.maps[layer][n] for _, made, n, _ in kept]) for layer in first.maps},
        rows=[{name: row[name] for name in names} for row, *_ in kept],
    )
