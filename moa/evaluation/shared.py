"""The `compare-methods` stage: how well two methods keep the context, over the same pixels.

A method that draws larger people leaves fewer pixels beside them. What `compare-swaps` and `compare-prior`
measure for each method by itself is therefore measured again for two, outside everyone whom either shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from moa.data.records import write_rows
from moa.evaluation import context, features, samples
from moa.evaluation.features import Features
from moa.evaluation.measures import MEASURE, measure_row, unit_of
from moa.evaluation.perceptual import NO_LPIPS, PerceptualConfig, load_perceptual
from moa.evaluation.preserved import request_of
from moa.evaluation.samples import Row

Pairs = list[tuple[Row, Row]]


def compare(
    made: Sequence[str | Path],
    seen: Sequence[str | Path],
    results: str | Path,
    output: str | Path,
    prior: Sequence[str | Path] = (),
    prior_seen: Sequence[str | Path] = (),
    dilation: float = 0.05,
    lpips: PerceptualConfig = NO_LPIPS,
) -> None:
    """Write `MEASURE` rows: swap_*_shared and prior_*_shared of what all the methods made.

    Args:
        made: `SAMPLE` rows of the methods.
        seen: their features.
        results: the folder that the rows' paths start from.
        output: parquet file to write.
        prior: `SAMPLE` rows of the prior, if there is one.
        prior_seen: their features.
        dilation: how far a person's mask is grown, as a fraction of the image's side.
        lpips: where its weights are.

    Raises:
        DataError: a broken or missing image or file.
    """
    rows, base = samples.read(made), samples.read(prior) if prior else []
    found = features.read([*seen, *prior_seen])
    perceptual = load_perceptual(lpips)
    values = [
        value
        for metric, pairs in tqdm(list(comparisons(rows, base)), "compare methods", unit="request")
        for value in alike(metric, pairs, found, Path(results), dilation, perceptual)
    ]
    values.sort(key=lambda row: tuple(str(row[name]) for name in MEASURE.names))
    write_rows(output, values, MEASURE)


def comparisons(rows: Sequence[Row], base: Sequence[Row]) -> Iterator[tuple[str, Pairs]]:
    """What is compared, "swap" or "prior", and all methods' pairs of images for the same requests.

    Trainings are compared seed by seed, so that more of them change no value; a method that is not trained
    is compared with each.
    """
    requests = {request_of(row): row for row in base}
    swaps = [("swap", one, other) for one, other in context.swaps(rows)]
    priors = [("prior", row, requests[request_of(row)]) for row in rows if request_of(row) in requests]
    groups: dict[tuple[object, ...], Pairs] = {}
    for metric, one, other in [*swaps, *priors]:
        groups.setdefault((metric, request_of(one), request_of(other)), []).append((dict(one), dict(other)))
    methods = {row["method"] for row in rows}
    for key, pairs in groups.items():
        trained = sorted({one["train_seed"] for one, _ in pairs} - {None})
        for seed in trained or [None]:
            own = [
                (one | {"train_seed": seed}, other)
                for one, other in pairs
                if one["train_seed"] in (None, seed)
            ]
            if {one["method"] for one, _ in own} == methods:
                yield str(key[0]), own


def alike(
    metric: str,
    pairs: Pairs,
    found: Mapping[str, Features],
    results: Path,
    dilation: float,
    lpips: context.Distance | None = None,
) -> Iterable[Row]:
    """PSNR, SSIM and LPIPS of each pair outside the people of all, as `MEASURE` rows.

    There are none if nobody was found in one of the images, or if too little is left to compare.
    """
    persons = [found[row["path"]].persons for pair in pairs for row in pair]
    if not all(mask.any() for mask in persons):
        return
    mask = context.dilate(np.logical_or.reduce(persons), dilation)
    for one, other in pairs:
        kept = context.kept(_pixels(results / one["path"]), _pixels(results / other["path"]), mask, lpips)
        if kept is None:
            return
        more = (other["subject"],) if metric == "swap" else ()
        about = {"unit": unit_of(one, *more), "members": sorted({*one["members"], *other["members"]})}
        yield from measure_row(one, f"{metric}_psnr_shared", kept.psnr, **about)
        yield from measure_row(one, f"{metric}_ssim_shared", kept.ssim, **about)
        yield from measure_row(one, f"{metric}_lpips_shared", kept.lpips, **about)


@lru_cache(maxsize=256)
def _pixels(path: Path) -> context.Pixels:
    return np.asarray(samples.open_image(path)[0])
