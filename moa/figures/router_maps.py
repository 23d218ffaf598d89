"""Router maps by layer and timestep (the paper's Fig. 6): how much each pixel goes to the prior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moa.evaluation.maps import SavedMaps, load_maps
from moa.figures.layout import save_plot, style


def pick(count: int, total: int) -> list[int]:
    """At most `count` places spread from the first to the last of `total`."""
    return sorted({round(x) for x in np.linspace(0, total - 1, min(count, total))})


def short(layer: str) -> str:
    """ "down_blocks.0.attentions.0.transformer_blocks.0.attn1" as "down 0.0 self"."""
    parts = layer.split(".")
    numbers = ".".join(part for part in parts[1:] if part.isdigit())
    kind = {"attn1": "self", "attn2": "cross"}.get(parts[-1], parts[-1])
    return f"{parts[0].removesuffix('_blocks').removesuffix('_block')} {numbers} {kind}"


@style()
def draw(saved: SavedMaps, images: Sequence[int], steps: Sequence[int], layers: Sequence[str]) -> Figure:
    """A matplotlib figure: for each image a block of rows (layers) and columns (timesteps).

    Blue pixels go to the prior, red ones to the personalization expert.
    """
    high, wide = len(layers), len(steps) + 1
    size = (0.9 * wide * len(images) + 0.8, 0.85 * high + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    ratios = [0.9 * wide] * len(images) + [0.8]
    *blocks, margin = np.ravel(np.array(figure.subfigures(1, len(ratios), width_ratios=ratios)))
    for block, image in zip(blocks, images, strict=True):
        block.suptitle(f"{saved.rows[image]['subject']}\n{saved.rows[image]['prompt']}", fontsize=8)
        shown = _block(block.subplots(high, wide, squeeze=False), saved, image, steps, layers)
    bar = margin.colorbar(shown, cax=margin.add_axes((0.1, 0.25, 0.2, 0.5)))
    bar.set_label("prior weight", fontsize=8)
    return figure


def _block(axes: Any, saved: SavedMaps, image: int, steps: Sequence[int], layers: Sequence[str]) -> Any:
    """Fill axes [layers, 1 + steps] with an image, its mask and its maps; returns the last map's artist."""
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        for spine in axis.spines.values():
            spine.set_visible(False)
    axes[0, 0].imshow(saved.images[image])
    axes[0, 0].set_title("image", fontsize=7)
    if len(layers) > 1:
        axes[1, 0].imshow(saved.masks[image], cmap="gray", vmin=0, vmax=1)
        axes[1, 0].set_xlabel("subject's mask", fontsize=7)
    for row, layer in enumerate(layers):
        for column, step in enumerate(steps, start=1):
            shown = axes[row, column].imshow(saved.maps[layer][image, step], cmap="RdBu", vmin=0, vmax=1)
            if row == 0:
                axes[row, column].set_title(f"t = {saved.timesteps[step]}", fontsize=7)
        axes[row, 1].set_ylabel(short(layer), fontsize=6)
    return shown


def router_maps(
    maps: str | Path, output: str | Path, images: int = 2, steps: int = 5, layers: int = 16
) -> None:
    """Draw saved router maps.

    Args:
        maps: file of `moa.evaluation.router.record`.
        output: PNG file.
        images, steps, layers: at most how many, spread over those that there are.
    """
    saved = load_maps(maps)
    names = list(saved.maps)
    chosen = [names[i] for i in pick(layers, len(names))]
    shown = list(range(min(images, len(saved.images))))
    figure = draw(saved, shown, pick(steps, len(saved.timesteps)), chosen)
    if len(chosen) < len(names):
        figure.supxlabel(f"{len(chosen)} of {len(names)} layers", fontsize=8)
    save_plot(figure, output)
