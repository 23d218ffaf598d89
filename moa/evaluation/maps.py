"""What the router was seen to do: the table of it, and the saved maps that figure and notebook read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moa.data.errors import DataError
from moa.data.records import read_rows
from moa.evaluation.statistics import interval
from moa.evaluation.table import Table, limits, save
from moa.files import write_atomically

Rows = Sequence[Mapping[str, Any]]
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
            "steps": pa.int32(),  # of the sampling; at those without a row the router is fixed to the prior
            "inside": pa.float64(),  # mean prior weight in the dilated subjects; null if nobody was found
            "outside": pa.float64(),  # and beside them; null if nothing is beside them
        }.items()
    ],
    metadata={"moa_schema": "router/2"},
)


# --- Saved maps -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedMaps:
    """What the figure and the notebook read."""

    images: NDArray[np.uint8]  # [N, H, W, 3]
    masks: Mask  # [N, H, W], the segmenter's persons, not dilated
    timesteps: list[int]  # noisiest first
    maps: dict[str, Maps]  # layer, in the order of the U-Net: [N, steps, h, w]
    rows: list[dict[str, Any]]  # subject, prompt, seed of each image


def save_maps(path: str | Path, saved: SavedMaps) -> None:
    """Write maps as one safetensors file; half precision is plenty for weights in 0..1."""
    tensors: dict[str, NDArray[Any]] = {
        "images": saved.images,
        "masks": saved.masks.astype(np.uint8),
        "timesteps": np.array(saved.timesteps, dtype=np.int64),
    }
    for layer, maps in saved.maps.items():
        tensors[f"maps/{layer}"] = maps.astype(np.float16)
    about = {"layers": json.dumps(list(saved.maps)), "rows": json.dumps(saved.rows)}
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


def by_image(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """`ROUTER` rows, image by image."""
    images: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        images.setdefault((row["kind"], row["subject"], row["prompt_id"], row["index"]), []).append(row)
    return list(images.values())


def is_whole(image: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an image shows somebody, and something beside them."""
    return image[0]["inside"] is not None and image[0]["outside"] is not None


def means(image: Sequence[Mapping[str, Any]], side: str, fixed: bool = False) -> float:
    """Mean prior weight of an image on one side, over layers and recorded timesteps.

    With `fixed` over all steps of its sampling: at those that were not recorded the prior's weight is 1.
    """
    recorded = float(np.mean([row[side] for row in image]))
    share = sum(row["layer"] == image[0]["layer"] for row in image) / image[0]["steps"]
    return share * recorded + 1 - share if fixed else recorded


def layer_parts(rows: Rows) -> list[tuple[str, Rows]]:
    """`ROUTER` rows of L, the layers of the losses, and then of each layer, with what they are called."""
    layers = dict.fromkeys(row["layer"] for row in rows)
    alone = [(layer, [row for row in rows if row["layer"] == layer]) for layer in layers]
    return [("L", [row for row in rows if row["in_losses"]]), *alone]


def regions(part: Rows, fixed: bool = False) -> list[dict[str, Any]]:
    """Mean prior weight outside and inside the subjects, and their difference; empty if no image is whole.

    An image counts with its mean over layers and timesteps (`means`); images without anybody, or with
    nothing but subjects, are left out and counted.
    """
    images = by_image(part)
    whole = [own for own in images if is_whole(own)]
    if not whole:
        return []
    outside, inside = (np.array([means(own, side, fixed) for own in whole]) for side in ("outside", "inside"))
    sides = {"outside": outside, "inside": inside, "outside - inside": outside - inside}
    counts = {"images": len(whole), "left_out": len(images) - len(whole)}
    members = [own[0]["subjects"] for own in whole]
    return [
        {"region": region, **counts, **limits("prior_weight", interval(values, members))}
        for region, values in sides.items()
    ]


REGION = ("region", "images", "left_out", "prior_weight", "prior_weight_low", "prior_weight_high")


def summary(rows: Rows) -> Table:
    """`regions` over L and then by layer.

    Of L there are also rows over all timesteps, those at which the router is fixed to the prior counted as 1.
    """
    table = []
    for name, part in layer_parts(rows):
        for timesteps in ("free", "all") if name == "L" else ("free",):
            about = {"layers": name, "timesteps": timesteps}
            table += [about | row for row in regions(part, timesteps == "all")]
    note = (
        "L: the layers of the losses. Conditional half. Timesteps: free, those at which the router decides; "
        "all, those at which it is fixed to the prior counted as 1."
    )
    return Table(("layers", "timesteps", *REGION), table, (note,))


def by_timestep(rows: Rows) -> Table:
    """`regions` over L and then by layer, at each timestep at which the router decides, noisiest first."""
    table = []
    for name, part in layer_parts(rows):
        for timestep in sorted({row["timestep"] for row in part}, reverse=True):
            about = {"layers": name, "timestep": timestep}
            table += [about | row for row in regions([r for r in part if r["timestep"] == timestep])]
    return Table(("layers", "timestep", *REGION), table)


def tabulate(rows: str | Path, output: str | Path, timesteps: str | Path) -> None:
    """Write `summary` and `by_timestep` as .csv, .md or .tex, from `ROUTER` rows."""
    read = read_rows(rows, ROUTER)
    save(summary(read), output)
    save(by_timestep(read), timesteps)
