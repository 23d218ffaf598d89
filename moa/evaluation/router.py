"""Where the router sends pixels: prior weights R_0 by layer and timestep while MoA generates (paper, Fig. 6).

Only the conditional half of guidance is looked at. Inside and outside are told apart by the segmenter on the
generated image, its mask dilated and averaged down to each layer's resolution.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from moa.attention import Recorder
from moa.baselines.moa import MoA, make
from moa.data.errors import DataError
from moa.data.records import read_rows, write_atomically, write_rows
from moa.data.segment import SegmentConfig
from moa.evaluation import samples
from moa.evaluation.context import dilate
from moa.evaluation.persons import PersonFinder
from moa.evaluation.samples import REQUEST, Row
from moa.evaluation.statistics import interval
from moa.evaluation.tables import Table, limits, save
from moa.methods import MethodConfig, ModelSource, Request, Sampling
from moa.sampling import in_batches, run

Maps = NDArray[np.float32]
Mask = NDArray[np.bool_]

ROUTER = pa.schema(
    [
        pa.field(name, kind, nullable=name in ("inside", "outside"))
        for name, kind in {
            "subject": pa.string(),
            "subjects": pa.list_(pa.string()),
            "kind": pa.string(),
            "prompt_id": pa.string(),
            "index": pa.int32(),
            "layer": pa.string(),  # qualified name of the attention layer
            "in_losses": pa.bool_(),  # belongs to the layers L of the losses
            "timestep": pa.int32(),  # 999 is pure noise
            "inside": pa.float64(),  # mean prior weight in the dilated subjects; null if nobody was found
            "outside": pa.float64(),  # and beside them; null if nothing is beside them
        }.items()
    ],
    metadata={"moa_schema": "router/1"},
)


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
    device: Literal["cpu", "cuda"] = "cpu"

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
    timesteps: list[int]  # in the order of sampling, noisiest first
    maps: dict[str, Maps]  # layer: prior weight [B, steps, h, w], 0..1


class MoARecorder:
    """MoA's sampler that keeps the router's weights of every step."""

    def __init__(self, moa: MoA):
        self.moa = moa

    def record(self, requests: Sequence[Request]) -> Recording:
        """Generate a batch and keep the router's weights of its conditional half."""
        pipe, sampling = self.moa.pipe, self.moa.sampling
        recorder = Recorder(maps=False)
        timesteps: list[int] = []
        steps: dict[str, list[torch.Tensor]] = {}

        def keep(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
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
        shape = pipe.unet.config.sample_size
        order = [layer for layer in self.moa.adapter.sizes if layer in steps]
        maps = {layer: square(torch.stack(steps[layer], 1).numpy(), shape) for layer in order}
        return Recording(images, timesteps, maps)


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
) -> None:
    """Generate with MoA and write what the router did.

    Args:
        config: models and sampling.
        requests: parquet files of `REQUEST` rows, such as the validation split's single and swap kinds.
        subjects: the split's subjects file.
        trained: the folder of the trained adapter.
        rows_out: `ROUTER` rows, one an image, layer and timestep.
        maps_out: safetensors file with the maps of `config.kept` images (see `load_maps`).
    """
    rows = sorted(samples.read(requests, REQUEST), key=samples.sort_key)
    photos, moa, find = (
        samples.read_subjects(subjects),
        MoARecorder(make(config.method(Path(trained)))),
        config.persons(),
    )
    wanted = showcase(rows, config.kept)
    measured: list[Row] = []
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
                measured += measure(row, made, n, grown, set(moa.moa.adapter.loss_layers))
            done += len(batch)
            bar.update(len(batch))
    write_rows(rows_out, measured, ROUTER)
    save_maps(maps_out, [kept[index] for index in wanted])


def showcase(rows: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """Which rows' maps to keep: different subjects with the same noise and prompt, if there are any."""
    by_noise: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(rows):
        by_noise.setdefault((row["kind"], row["prompt_id"], row["seed"]), []).append(index)
    largest = max(by_noise.values(), key=len, default=[])
    rest = [index for index in range(len(rows)) if index not in set(largest)]
    return (largest + rest)[:count]


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
                "inside": None if inside is None else float(inside[step]),
                "outside": None if outside is None else float(outside[step]),
            }
            measured.append({**about, **values})
    return measured


# --- Saved maps -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedMaps:
    """What the figure and the notebook read."""

    images: NDArray[np.uint8]  # [N, H, W, 3]
    masks: Mask  # [N, H, W], the segmenter's persons, not dilated
    timesteps: list[int]  # noisiest first
    maps: dict[str, Maps]  # layer, in the order of the U-Net: [N, steps, h, w]
    rows: list[dict[str, Any]]  # subject, prompt, seed of each image


def save_maps(path: str | Path, kept: Sequence[tuple[Row, Recording, int, Mask]]) -> None:
    """Write maps as one safetensors file; half precision is plenty for weights in 0..1."""
    if not kept:
        raise DataError(
            f"{path}: no image to keep maps of; `kept` must be at least 1, and requests not empty"
        )
    layers = list(kept[0][1].maps)
    tensors: dict[str, NDArray[Any]] = {
        "images": np.stack([np.asarray(made.images[n].convert("RGB")) for _, made, n, _ in kept]),
        "masks": np.stack([mask for *_, mask in kept]).astype(np.uint8),
        "timesteps": np.array(kept[0][1].timesteps, dtype=np.int64),
    }
    for layer in layers:
        tensors[f"maps/{layer}"] = np.stack([made.maps[layer][n] for _, made, n, _ in kept]).astype(
            np.float16
        )
    names = ("subject", "prompt", "prompt_id", "index", "seed")
    rows = [{name: row[name] for name in names} for row, *_ in kept]
    about = {"layers": json.dumps(layers), "rows": json.dumps(rows)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=about))


def load_maps(path: str | Path) -> SavedMaps:
    """Read `save_maps`'s file. Raises DataError naming a missing or broken file and the cure."""
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist; run the workflow to make it, or correct the path")
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata()
            layers = json.loads(about["layers"])
            return SavedMaps(
                images=file.get_tensor("images"),
                masks=file.get_tensor("masks") > 0,
                timesteps=file.get_tensor("timesteps").tolist(),
                maps={layer: file.get_tensor(f"maps/{layer}").astype(np.float32) for layer in layers},
                rows=json.loads(about["rows"]),
            )
    except (SafetensorError, KeyError, TypeError) as error:
        raise DataError(f"{path} is cut short or damaged ({error}); delete it and run again") from error


# --- The table --------------------------------------------------------------------------------------------


def summary(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Mean prior weight outside and inside the subjects and their difference, over L and then by layer.

    An image counts with its mean over layers and timesteps; images without anybody, or with nothing but
    subjects, are left out and counted.
    """
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    parts = [("L", [row for row in rows if row["in_losses"]])]
    parts += [(layer, [row for row in rows if row["layer"] == layer]) for layer in layers]
    table = []
    for name, part in parts:
        images: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for row in part:
            images.setdefault((row["kind"], row["subject"], row["prompt_id"], row["index"]), []).append(row)
        whole = [
            own for own in images.values() if own[0]["inside"] is not None and own[0]["outside"] is not None
        ]
        counts = {"images": len(whole), "left_out": len(images) - len(whole)}
        if not whole:
            continue
        members = [own[0]["subjects"] for own in whole]
        sides = {
            side: np.array([np.mean([row[side] for row in own]) for own in whole])
            for side in ("outside", "inside")
        }
        sides["outside - inside"] = sides["outside"] - sides["inside"]
        for region, values in sides.items():
            weight = limits("prior_weight", interval(values, members))
            table.append({"layers": name, "region": region, **counts, **weight})
    columns = (
        "layers",
        "region",
        "images",
        "left_out",
        "prior_weight",
        "prior_weight_low",
        "prior_weight_high",
    )
    return Table(columns, table, ("L: the layers of the losses. Conditional half, all timesteps.",))


def tabulate(rows: str | Path, output: str | Path) -> None:
    """Write router.csv, or .md or .tex, from `ROUTER` rows."""
    save(summary(read_rows(rows, ROUTER)), output)
