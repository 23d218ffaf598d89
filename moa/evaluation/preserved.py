"""The `compare-prior` stage: what of the prior's image is still there once a subject is put in.

Every image is compared with the prior's for the same request, hence the same noise, and, as a floor, with
the prior's for the same prompt and other noise. PSNR, SSIM and LPIPS look outside everyone who was found in
either image, as under a swap; the layout is compared by intersection over union of the persons' masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from moa.data.errors import DataError
from moa.data.records import write_rows
from moa.evaluation import context, features, samples
from moa.evaluation.features import Features
from moa.evaluation.perceptual import NO_LPIPS, PerceptualConfig, load_perceptual
from moa.evaluation.samples import Row

Mask = NDArray[np.bool_]

_SAME = ("method", "train_seed", "split", "kind", "subject", "members", "prompt_id", "prompt_group", "index")
_LIKENESS = ("psnr", "ssim", "lpips", "layout")
PRESERVED = pa.schema(
    [
        *(samples.SAMPLE.field(name) for name in _SAME),
        *(pa.field(name, pa.float64()) for name in _LIKENESS),  # to the prior's image of the same noise
        *(pa.field(f"noise_{name}", pa.float64()) for name in _LIKENESS),  # and of other noise
        pa.field("noise_subjects", pa.list_(pa.string())),  # whose request has that noise; null if none has
    ],
    metadata={"moa_schema": "preserved/4"},
)


@dataclass(frozen=True)
class View:
    """An image and where its persons are."""

    pixels: NDArray[np.uint8]  # [H, W, 3]
    persons: Mask  # [H, W]


def layout(one: Mask, other: Mask) -> float | None:
    """Intersection over union, 0..1, of two masks [H, W]; None if nobody is in one of them."""
    if not one.any() or not other.any():
        return None
    return float((one & other).sum() / (one | other).sum())


def likeness(
    one: View, other: View, dilation: float, lpips: context.Distance | None = None
) -> dict[str, float | None]:
    """PSNR, SSIM and LPIPS outside the dilated persons of both images, and the layout; None where unknown."""
    found = one.persons.any() and other.persons.any()
    mask = context.dilate(one.persons | other.persons, dilation)
    kept = context.kept(one.pixels, other.pixels, mask, lpips) if found else None
    return {
        "psnr": kept.psnr if kept else None,
        "ssim": kept.ssim if kept else None,
        "lpips": kept.lpips if kept else None,
        "layout": layout(one.persons, other.persons),
    }


def request_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes an image the same request, whoever carries it out: also the noise."""
    return row["split"], row["kind"], row["subject"], row["prompt_id"], row["index"], row["seed"]


def other_noise(rows: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
    """For each request the next row, going round, of the same prompt text and other noise, if any."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=samples.sort_key):
        groups.setdefault((row["split"], row["kind"], row["prompt"]), []).append(row)
    found = {}
    for group in groups.values():
        for n, row in enumerate(group):
            after = (other for other in [*group[n + 1 :], *group[:n]] if other["seed"] != row["seed"])
            if other := next(after, None):
                found[request_of(row)] = other
    return found


def compare(
    made: str | Path,
    seen: str | Path,
    prior: str | Path,
    prior_seen: str | Path,
    results: str | Path,
    output: str | Path,
    dilation: float = 0.05,
    prior_results: str | Path | None = None,
    lpips: PerceptualConfig = NO_LPIPS,
) -> None:
    """Write `PRESERVED` rows, one for each image whose request the prior carried out too.

    Args:
        made: `SAMPLE` rows of a method.
        seen: their features.
        prior: `SAMPLE` rows of the prior.
        prior_seen: their features.
        results: the folder that the rows' paths start from.
        output: parquet file to write.
        dilation: how far a person's mask is grown, as a fraction of the image's side.
        prior_results: the folder that the paths of the prior's rows start from, if it is another.
        lpips: where its weights are.

    Raises:
        DataError: a broken or missing image, or a request with other noise than the prior's.
    """
    rows, base = samples.read(made), samples.read(prior)
    found: dict[str, Features] = {**features.read(prior_seen), **features.read(seen)}
    same, other = {request_of(row): row for row in base}, other_noise(base)
    _check_noise(rows, same)
    perceptual = load_perceptual(lpips)

    def view(row: Row, root: str | Path = results if prior_results is None else prior_results) -> View:
        pixels = np.asarray(samples.open_image(Path(root) / row["path"])[0])
        return View(pixels, found[row["path"]].persons)

    preserved = []
    for row in tqdm(sorted(rows, key=samples.sort_key), "compare with the prior", unit="image"):
        key = request_of(row)
        if key not in same:
            continue
        own = view(row, results)
        noise: dict[str, float | None] = dict.fromkeys(_LIKENESS)
        if key in other:
            noise = likeness(own, view(other[key]), dilation, perceptual)
        preserved.append(
            {name: row[name] for name in _SAME}
            | likeness(own, view(same[key]), dilation, perceptual)
            | {f"noise_{name}": value for name, value in noise.items()}
            | {"noise_subjects": other[key]["subjects"] if key in other else None}
        )
    write_rows(output, preserved, PRESERVED)


def _check_noise(rows: Sequence[Row], same: Mapping[tuple[Any, ...], Row]) -> None:
    """Raise DataError if the prior made a request of the rows with other noise."""
    known = {key[:-1] for key in same}
    wrong = [key for key in map(request_of, rows) if key not in same and key[:-1] in known]
    if wrong:
        raise DataError(
            f"{len(wrong)} images and the prior's have different seeds, such as {wrong[0]}; make both again"
        )
