"""Whether the router does the same whoever is shown: correlations of its maps (paper, 4.2, Fig. 6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moa.evaluation.context import swaps
from moa.evaluation.maps import Maps
from moa.evaluation.measures import measure_row, unit_of
from moa.evaluation.samples import Row

LayerMaps = Mapping[str, Maps]  # layer: prior weight [steps, h, w], 0..1


def correlation(one: LayerMaps, other: LayerMaps) -> float | None:
    """Pearson's correlation over the pixels of two images' maps, mean over layers and steps, -1..1.

    Maps that are flat in one of the images have none; None if that is so of all.
    """
    found = []
    for layer, maps in one.items():
        a, b = (m.reshape(len(m), -1).astype(float) for m in (maps, other[layer]))
        a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
        norm = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
        told = norm > 1e-9
        found += list((a * b).sum(axis=1)[told] / norm[told])
    return float(np.mean(found)) if found else None


def compare(rows: Sequence[Mapping[str, Any]], maps: Sequence[LayerMaps]) -> Iterator[Row]:
    """`MEASURE` rows of each two images that differ in their subjects only.

    router_alike is the correlation of their maps; router_alike_excess is that less the correlation of the
    first with the second subject's next image, of other noise and maybe another prompt.

    Args:
        rows: requests of one split and training.
        maps: their images' maps, of the layers of the losses.
    """
    place = {(row["kind"], row["subject"], row["prompt_id"], row["index"]): n for n, row in enumerate(rows)}

    def maps_of(row: Mapping[str, Any]) -> LayerMaps:
        return maps[place[row["kind"], row["subject"], row["prompt_id"], row["index"]]]

    for one, other in swaps([{**row, "method": "moa", "train_seed": None} for row in rows]):
        unit = unit_of(one, other["subject"])
        about = {"unit": unit, "members": sorted({*one["subjects"], *other["subjects"]})}
        same = correlation(maps_of(one), maps_of(other))
        yield from measure_row(one, "router_alike", same, **about)
        apart = next_image(other, rows)
        unlike = None if apart is None else correlation(maps_of(one), maps_of(apart))
        if same is not None and unlike is not None:
            yield from measure_row(one, "router_alike_excess", same - unlike, **about)


def next_image(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The next image of the same subject and kind with other noise, in a ring; None if there is none."""
    own = sorted(
        (r for r in rows if (r["kind"], r["subject"]) == (row["kind"], row["subject"])),
        key=lambda r: (r["prompt_id"], r["index"]),
    )
    here = [(r["prompt_id"], r["index"]) for r in own].index((row["prompt_id"], row["index"]))
    others = [r for r in own[here + 1 :] + own[:here] if r["seed"] != row["seed"]]
    return others[0] if others else None
