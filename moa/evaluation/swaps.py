"""The `compare-swaps` stage: what is kept between images that differ in their subjects alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moa.data.records import write_rows
from moa.evaluation import context, features, samples
from moa.evaluation.perceptual import NO_LPIPS, PerceptualConfig, load_perceptual
from moa.evaluation.samples import KEPT, SAMPLE, Row


def compare_swaps(
    made: Sequence[str | Path],
    seen: Sequence[str | Path],
    results: str | Path,
    output: str | Path,
    dilation: float = 0.05,
    lpips: PerceptualConfig = NO_LPIPS,
) -> None:
    """Write `KEPT` rows: context kept between images of the same prompt and noise with different subjects.

    A pair has no values if nobody was found in one of its images, whose person would count as context, or if
    the subjects leave too little to compare.

    Args:
        made: `SAMPLE` files; rows of a kind whose noise is shared form pairs, others none.
        seen: the features files of these images.
        results: the folder that the rows' paths start from.
        output: parquet file to write.
        dilation: how far a subject's mask is grown, as a fraction of the image's side.
        lpips: where its weights are.
    """
    rows, found = samples.read(made, SAMPLE), features.read(seen)
    perceptual = load_perceptual(lpips)
    kept = []
    for one, other in tqdm(context.swaps(rows), "compare swaps", unit="pair"):
        pixels = [np.asarray(samples.open_image(Path(results) / row["path"])[0]) for row in (one, other)]
        persons = [found[row["path"]].persons for row in (one, other)]
        mask = context.dilate(persons[0] | persons[1], dilation)
        somebody = all(p.any() for p in persons)
        alike = context.kept(pixels[0], pixels[1], mask, perceptual) if somebody else None
        kept.append(_kept_row(one, other, alike, float(1 - mask.mean())))
    kept.sort(key=lambda r: tuple(str(r[name]) for name in KEPT.names[:9]))
    write_rows(output, kept, KEPT)


def _kept_row(
    one: Mapping[str, Any], other: Mapping[str, Any], alike: context.Kept | None, outside: float
) -> Row:
    same = ("method", "train_seed", "split", "kind", "prompt_id", "prompt_group", "index", "subject")
    return {
        **{name: one[name] for name in same},
        "other": other["subject"],
        "members": sorted({*one["members"], *other["members"]}),
        "psnr": alike.psnr if alike else None,
        "ssim": alike.ssim if alike else None,
        "lpips": alike.lpips if alike else None,
        "outside": outside,
    }
