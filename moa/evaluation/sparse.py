"""What sparse experts cost in quality, and save in time, at each threshold τ: `snakemake sparse`.

The same requests are generated dense and with every τ, batch by batch in turns, so that what else the machine
does falls on all alike. Beside each τ: the PSNR of its images to the dense ones, IP, time, and the share of
pixels that the expert had left to draw, as the routers of the dense run say.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image
from tqdm import tqdm

from moa.baselines.moa import MoA, make
from moa.data.subjects import read_subjects
from moa.evaluation import samples
from moa.evaluation.context import psnr
from moa.evaluation.identity import DetectorConfig, EmbedderConfig
from moa.evaluation.identity import score as score_identity
from moa.evaluation.judges import Judges, ScoreConfig
from moa.evaluation.references import faces_of, look_at_photos
from moa.evaluation.router import MoARecorder, Recording
from moa.evaluation.samples import REQUEST
from moa.evaluation.statistics import interval
from moa.evaluation.table import Table, limits, save
from moa.methods import MethodConfig, ModelSource, Request, Sampling
from moa.sampling import in_batches

COLUMNS = (
    "threshold", "images", "active", "psnr", "psnr_least", "ip", "ip_low", "ip_high",
    "seconds_per_image", "time_ratio", "cpu_ratio",
)  # fmt: skip


@dataclass(frozen=True)
class SparseConfig:
    """Settings of the stage `sparse-curve`."""

    prior: ModelSource
    image_encoder: ModelSource
    clip_judge: ModelSource
    segmenter: ModelSource
    identity: EmbedderConfig = field(default_factory=EmbedderConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    sampling: Sampling = field(default_factory=Sampling)
    thresholds: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # τ, beside 0
    segmenter_threshold: float = 0.8  # least score of a segment
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.thresholds or not all(0 < t < 1 for t in self.thresholds):
            raise ValueError(f"thresholds {self.thresholds}: give router weights between 0 and 1")

    def method(self, trained: Path) -> MethodConfig:
        return MethodConfig(self.prior, self.image_encoder, trained, self.sampling, device=self.device)

    def judges(self) -> Judges:
        return Judges(
            ScoreConfig(
                self.clip_judge,
                self.segmenter,
                self.identity,
                self.detector,
                segmenter_threshold=self.segmenter_threshold,
                device=self.device,
            )
        )


@dataclass
class Turns:
    """What was made with one threshold."""

    images: list[Image.Image] = field(default_factory=list)
    seconds: float = 0.0  # by the clock
    cpu_seconds: float = 0.0  # that the cores worked


def generate(moa: MoA, requests: Sequence[Request], thresholds: Sequence[float]) -> dict[float, Turns]:
    """Images of all requests with every threshold, batch by batch in turns; the conditioner is as before."""
    made = {threshold: Turns() for threshold in thresholds}
    before = moa.conditioner.sparse_threshold
    try:
        for batch in tqdm(list(in_batches(requests, moa.sampling.batch_size)), desc="sparse experts"):
            for threshold, turns in made.items():
                moa.conditioner.sparse_threshold = threshold
                clock, cpu = time.perf_counter(), time.process_time()
                turns.images += moa.generate(batch)
                turns.seconds += time.perf_counter() - clock
                turns.cpu_seconds += time.process_time() - cpu
    finally:
        moa.conditioner.sparse_threshold = before
    return made


def active_shares(moa: MoA, requests: Sequence[Request], thresholds: Sequence[float]) -> dict[float, float]:
    """For each τ, and 0, the share of pixels with more than τ for the expert while sampling is dense.

    Over layers and over the steps at which the router decides, in the conditional half.
    """
    recorder, before = MoARecorder(moa), moa.conditioner.sparse_threshold
    moa.conditioner.sparse_threshold = 0.0
    try:
        counts = [
            active_pixels(recorder.record(batch), (0.0, *thresholds))
            for batch in in_batches(requests, moa.sampling.batch_size)
        ]
    finally:
        moa.conditioner.sparse_threshold = before
    *above, pixels = np.sum(counts, axis=0)
    return dict(zip((0.0, *thresholds), (float(n / pixels) for n in above), strict=True))


def active_pixels(recording: Recording, thresholds: Sequence[float]) -> list[int]:
    """How many pixels, of all layers and steps, lie above each threshold; and how many there are."""
    weights = [1 - maps for maps in recording.maps.values()]
    above = [sum(int(np.count_nonzero(w > threshold)) for w in weights) for threshold in thresholds]
    return [*above, sum(w.size for w in weights)]


def likeness(one: Sequence[Image.Image], other: Sequence[Image.Image]) -> np.ndarray:
    """PSNR in dB of each pair of images, at most 58.9."""
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(one, other, strict=True)]
    return np.array([psnr(a, b, np.ones(a.shape[:2], bool)) for a, b in pairs])


def run(
    config: SparseConfig,
    requests: Sequence[str | Path],
    subjects: str | Path,
    trained: str | Path,
    output: str | Path,
) -> None:
    """Write the curve, a row a threshold, the dense run first.

    Args:
        config: models, sampling and thresholds.
        requests: parquet files of `REQUEST` rows, of validation subjects: a threshold is a choice.
        subjects: the split's subjects file.
        trained: the folder of the trained adapter.
        output: the CSV.

    Raises:
        ValueError: requests of another split than validation.
    """
    rows = sorted(samples.read(requests, REQUEST), key=samples.sort_key)
    if any(row["split"] != "validation" for row in rows):
        raise ValueError("the requests are not all of the split validation: thresholds are chosen by this")
    people = read_subjects(subjects)
    moa = cast(MoA, make(config.method(Path(trained))))
    wanted = [samples.to_request(row, people) for row in rows]
    moa.generate(wanted[: config.sampling.batch_size])  # warms up
    made = generate(moa, wanted, (0.0, *config.thresholds))
    shares = active_shares(moa, wanted, config.thresholds)
    judges = config.judges()
    names = {name for row in rows for name in row["subjects"]}
    references = faces_of(look_at_photos(judges, {name: people[name].image for name in names}), names)

    def identity(images: Sequence[Image.Image]) -> list[float]:
        return [
            score_identity(
                np.stack([references[name].identity[0] for name in row["subjects"]]),
                seen.identity,
                seen.face_sizes,
            ).ip
            for row, seen in zip(rows, judges.look(images), strict=True)
        ]

    dense, table = made[0.0], []
    for threshold, turns in made.items():
        alike = likeness(turns.images, dense.images)
        table.append(
            {
                "threshold": threshold,
                "images": len(rows),
                "active": shares[threshold],
                "psnr": float(alike.mean()) if threshold else None,
                "psnr_least": float(alike.min()) if threshold else None,
                **limits("ip", interval(identity(turns.images), [row["subjects"] for row in rows])),
                "seconds_per_image": turns.seconds / len(rows),
                "time_ratio": turns.seconds / dense.seconds,
                "cpu_ratio": turns.cpu_seconds / dense.cpu_seconds,
            }
        )
    save(Table(COLUMNS, table), output)
