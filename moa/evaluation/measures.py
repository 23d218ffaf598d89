"""Measures of what the paper claims, from what the judges saw: a value an image, or a pair of images.

docs/metrics.md gives every measure's formula. The `measure` stage computes those that need the judges'
vectors and masks; `everything` joins them with those that stand in samples and comparisons already. No image
is opened.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moa.choose import greedy_pairs
from moa.data.records import read_rows, write_rows
from moa.evaluation import context, features, samples
from moa.evaluation.features import Features
from moa.evaluation.maps import ROUTER, by_image, is_whole
from moa.evaluation.preserved import PRESERVED, layout
from moa.evaluation.samples import KEPT, Row
from moa.evaluation.statistics import Interval, interval, ratio, slope

Floats = NDArray[np.float64]
Rows = Sequence[Mapping[str, Any]]

OCCLUDED = "occluded"  # the kind whose subjects are shown in partly hidden photos
MEASURE = pa.schema(
    [
        pa.field(name, kind, nullable=name == "train_seed")
        for name, kind in {
            "metric": pa.string(),
            "method": pa.string(),
            "split": pa.string(),
            "kind": pa.string(),
            "train_seed": pa.int64(),  # of which training; null if the method is not trained
            "group": pa.string(),  # of the prompt
            "unit": pa.string(),  # the image or pair of images; methods are paired by it
            "members": pa.list_(pa.string()),  # the subjects that it belongs to
            "value": pa.float64(),
        }.items()
    ],
    metadata={"moa_schema": "measure/2"},
)


# --- One image, or two ------------------------------------------------------------------------------------


def likeness_to_each(references: Floats, faces: Floats) -> tuple[float, float] | None:
    """How like its own reference, and how like the others', the faces of an image are.

    Args:
        references: [S, D] unit vectors, S >= 2.
        faces: [N, D] unit vectors, the largest face first.

    Returns:
        Mean cosine of each of the S largest faces with the reference that it is matched to (greedily, as for
        IP), and with the other references; both -1..1. None if there are fewer faces than references.
    """
    wanted = len(references)
    if len(faces) < wanted:
        return None
    similarity = references @ faces[:wanted].T
    pairs = greedy_pairs(similarity)
    own = np.mean([similarity[pair] for pair in pairs])
    return float(own), float((similarity.sum() - own * wanted) / (wanted * (wanted - 1)))


def likeness_of_references(references: Floats) -> float:
    """Mean cosine, -1..1, of two different ones of [S, D] unit vectors: what a faithful method's leak is."""
    wanted = len(references)
    return float((np.sum(references @ references.T) - wanted) / (wanted * (wanted - 1)))


def first_face(seen: Features, size: int) -> Floats:
    """[D] unit vector of the largest face; zeros, which resemble nobody, if there is none."""
    return seen.identity[0] if len(seen.identity) else np.zeros(size)


def swapped(faces: Floats, references: Floats) -> dict[str, float]:
    """What a swap did to the faces.

    Args:
        faces: [2, D], the largest face of each image; a row of zeros where there is none.
        references: [2, D] unit vectors of the two subjects, in the same order.

    Returns:
        swap_right and swap_other, the mean cosines with the image's own reference and with the other one;
        their difference swap_margin; and swap_named, the share of the images nearer to their own.
    """
    similarity = faces @ references.T
    right, other = np.diag(similarity), np.diag(similarity[:, ::-1])
    return {
        "swap_right": float(right.mean()),
        "swap_other": float(other.mean()),
        "swap_margin": float((right - other).mean()),
        "swap_named": float((right > other).mean()),
    }


def seed_pairs(rows: Rows) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Pairs of a method's rows with the same kind, subjects and prompt, and different noise.

    Images of different subjects are none: they also differ in how these look, which the prior's do not.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=samples.sort_key):
        key = ("train_seed", "split", "kind", "subject", "prompt")
        groups.setdefault(tuple(row[name] for name in key), []).append(row)
    pairs = [pair for group in groups.values() for pair in combinations(group, 2)]
    return [(one, other) for one, other in pairs if one["seed"] != other["seed"]]


# --- From rows --------------------------------------------------------------------------------------------


def unit_of(row: Mapping[str, Any], *more: str) -> str:
    """The name under which methods are paired."""
    return "/".join([row["subject"], *more, row["prompt_id"], str(row["index"])])


def measure_row(row: Mapping[str, Any], metric: str, value: float | None, **changes: Any) -> Iterator[Row]:
    """The `MEASURE` row of a sample, if there is a value."""
    if value is not None:
        group = row.get("prompt_group", "")
        about = {name: row[name] for name in ("method", "split", "kind")}
        about |= {"train_seed": row.get("train_seed"), "group": group}
        own = changes or {"unit": unit_of(row), "members": row["members"]}
        yield {"metric": metric, "value": float(value), **about, **own}


def of_samples(rows: Rows) -> Iterator[Row]:
    """ip, pc, missing, found_ip and size of each image; the last two only where everyone was found."""
    for row in rows:
        yield from measure_row(row, "ip", row["ip"])
        yield from measure_row(row, "pc", row["pc"])
        wanted = len(row["subjects"])
        yield from measure_row(row, "missing", max(wanted - row["faces"], 0) / wanted)
        if row["found"]:
            yield from measure_row(row, "found_ip", row["ip"])
            yield from measure_row(row, "size", row["face_size"])


def of_pairs(rows: Rows, seen: Mapping[str, Features], references: Mapping[str, Features]) -> Iterator[Row]:
    """own, leak, leak_excess and apart of images with several subjects."""
    for row in rows:
        if len(row["subjects"]) > 1:
            wanted = np.stack([references[name].identity[0] for name in row["subjects"]])
            if found := likeness_to_each(wanted, seen[row["path"]].identity):
                own, leak = found
                excess = leak - likeness_of_references(wanted)
                values = {"own": own, "leak": leak, "leak_excess": excess, "apart": own - leak}
                for metric, value in values.items():
                    yield from measure_row(row, metric, value)


def of_swaps(rows: Rows, seen: Mapping[str, Features], references: Mapping[str, Features]) -> Iterator[Row]:
    """`swapped` of each two images that differ in their one subject only."""
    for one, other in context.swaps([row for row in rows if len(row["subjects"]) == 1]):
        wanted = np.stack([references[row["subject"]].identity[0] for row in (one, other)])
        faces = np.stack([first_face(seen[row["path"]], wanted.shape[1]) for row in (one, other)])
        members = sorted({*one["members"], *other["members"]})
        unit = unit_of(one, other["subject"])
        for metric, value in swapped(faces, wanted).items():
            yield from measure_row(one, metric, value, unit=unit, members=members)


def of_occlusion(
    rows: Rows, seen: Mapping[str, Features], references: Mapping[str, Features]
) -> Iterator[Row]:
    """plain_ip and plain_margin of the kind `occluded`: the same requests, from photos that hide nothing."""

    def request(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("train_seed", "split", "subject", "prompt", "index", "seed"))

    plain = {request(row): row for row in rows if row["kind"] != OCCLUDED}
    hidden = [row for row in rows if row["kind"] == OCCLUDED and request(row) in plain]
    for row in hidden:
        yield from measure_row(row, "plain_ip", plain[request(row)]["ip"])
    for one, other in context.swaps(hidden):
        twins = [{**plain[request(row)], "kind": OCCLUDED} | _names(row) for row in (one, other)]
        for value in of_swaps(twins, seen, references):
            if value["metric"] == "swap_margin":
                yield {**value, "metric": "plain_margin"}


def _names(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a prompt is called, which may differ between kinds."""
    return {name: row[name] for name in ("prompt_id", "prompt_group")}


def of_seeds(rows: Rows, seen: Mapping[str, Features]) -> Iterator[Row]:
    """vary_layout and vary_clip: how unlike two images of one prompt and different noise are."""
    for one, other in seed_pairs(rows):
        a, b = seen[one["path"]], seen[other["path"]]
        common = layout(a.persons, b.persons)
        values = {
            "vary_layout": None if common is None else 1 - common,
            "vary_clip": 1 - float(a.clip @ b.clip),
        }
        unit = f"{unit_of(one)}-{other['index']}"
        for metric, value in values.items():
            yield from measure_row(one, metric, value, unit=unit, members=one["members"])


def of_kept(rows: Rows) -> Iterator[Row]:
    """swap_psnr, swap_ssim and swap_lpips, and swap_outside, which every pair has, from `KEPT` rows."""
    for row in rows:
        for metric in ("psnr", "ssim", "lpips", "outside"):
            unit = unit_of(row, row["other"])
            yield from measure_row(row, f"swap_{metric}", row[metric], unit=unit, members=row["members"])


def of_preserved(rows: Rows) -> Iterator[Row]:
    """prior_*, and seed_* = prior_* less the same against other noise, from `PRESERVED` rows."""
    for row in rows:
        for metric in ("psnr", "ssim", "lpips", "layout"):
            same, noise = row[metric], row[f"noise_{metric}"]
            yield from measure_row(row, f"prior_{metric}", same)
            if same is not None and noise is not None:
                members = sorted({*row["members"], *row["noise_subjects"]})
                about = {"unit": unit_of(row), "members": members}
                yield from measure_row(row, f"seed_{metric}", same - noise, **about)


def of_router(rows: Rows) -> Iterator[Row]:
    """Prior weights of each image over the layers L, and how their contrast differs, from `ROUTER` rows.

    Images in which nobody, or nothing but people, was found have no values.
    """
    for own in filter(is_whole, by_image(rows)):
        row = {**own[0], "method": "moa", "split": "validation", "members": own[0]["subjects"]}
        for metric, value in _router_values(own).items():
            yield from measure_row(row, metric, value)


def _router_values(rows: Rows) -> dict[str, float | None]:
    """The router's measures of one image."""
    ours = [row for row in rows if row["in_losses"]]
    layers = list(dict.fromkeys(row["layer"] for row in ours))  # in the U-Net's order
    first = layers[: len(layers) // 2]
    middle = np.median([row["timestep"] for row in rows])

    def mean(column: Callable[[Mapping[str, Any]], float], part: Rows) -> float | None:
        return float(np.mean([column(row) for row in part])) if part else None

    def contrast(row: Mapping[str, Any]) -> float:
        return float(row["outside"] - row["inside"])

    def less(part: Callable[[Mapping[str, Any]], bool]) -> float | None:
        one = mean(contrast, [row for row in ours if part(row)])
        other = mean(contrast, [row for row in ours if not part(row)])
        return None if one is None or other is None else one - other

    return {
        "router_outside": mean(lambda row: row["outside"], ours),
        "router_inside": mean(lambda row: row["inside"], ours),
        "router_contrast": mean(contrast, ours),
        "router_layers": less(lambda row: row["layer"] in first),
        "router_timesteps": less(lambda row: row["timestep"] > middle),
    }


# --- The stage --------------------------------------------------------------------------------------------


def measure(made: str | Path, seen: str | Path, references: str | Path, output: str | Path) -> None:
    """Write the `MEASURE` rows that need the judges' vectors or masks.

    Args:
        made: `SAMPLE` rows of a method.
        seen: their features.
        references: features of the subjects' photos, by id.
        output: parquet file to write.
    """
    rows, found, wanted = samples.read(made), features.read(seen), features.read(references)
    values = [
        *of_pairs(rows, found, wanted),
        *of_swaps(rows, found, wanted),
        *of_occlusion(rows, found, wanted),
        *of_seeds(rows, found),
    ]
    write_rows(output, values, MEASURE)


def trial_measures(folder: Path) -> list[Row]:
    """`MEASURE` rows of a trial's samples.parquet, kept.parquet and preserved.parquet."""
    return [
        *of_samples(samples.read(folder / "samples.parquet")),
        *of_kept(read_rows([folder / "kept.parquet"], KEPT)),
        *of_preserved(read_rows([folder / "preserved.parquet"], PRESERVED)),
    ]


def everything(
    sample_files: Sequence[str | Path],
    kept: Sequence[str | Path] = (),
    measured: Sequence[str | Path] = (),
    preserved: Sequence[str | Path] = (),
    router: Sequence[str | Path] = (),
    alike: Sequence[str | Path] = (),
    split: str = "test",
) -> Measures:
    """All measures of a split; the router's are of the images on which it was recorded.

    Args:
        sample_files: scored rows.
        kept: `KEPT` rows.
        measured: what `measure`, and `moa.evaluation.shared.compare`, wrote.
        preserved: `PRESERVED` rows, if there is a prior.
        router: `ROUTER` rows, if there is a router.
        alike: likewise what `moa.evaluation.alike` made of its maps.
        split: whose images.
    """

    def of(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [row for row in rows if row["split"] == split]

    return Measures(
        [
            *of_samples(of(samples.read(sample_files))),
            *of_kept(of(read_rows(kept, KEPT))),
            *of(read_rows(measured, MEASURE)),
            *of_preserved(of(read_rows(preserved, PRESERVED))),
            *of_router(read_rows(router, ROUTER)),
            *read_rows(alike, MEASURE),
        ]
    )


@dataclass(frozen=True)
class Values:
    """A measure of a method, by unit; several training seeds are averaged."""

    of: dict[str, float]
    members: dict[str, Sequence[str]]

    def __len__(self) -> int:
        return len(self.of)

    def common(self, other: Values) -> list[str]:
        """Units that both have a value for."""
        return sorted(set(self.of) & set(other.of))

    def mean(self) -> Interval:
        """Mean over units, with its interval over subjects."""
        return interval(list(self.of.values()), [self.members[unit] for unit in self.of])

    def less(self, other: Values) -> Values:
        """The paired differences, of the units that both have."""
        units = self.common(other)
        return Values({u: self.of[u] - other.of[u] for u in units}, self._everyone(other, units))

    def minus(self, other: Values) -> Interval:
        """Mean paired difference over the units that both have. Raises ValueError if there are none."""
        return self.less(other).mean()

    def over(self, other: Values) -> Interval:
        """Ratio of the means over the units that both have. Raises ValueError for none, or a mean of 0."""
        units = self.common(other)
        own, others = ([values.of[unit] for unit in units] for values in (self, other))
        return ratio(own, others, list(self._everyone(other, units).values()))

    def _everyone(self, other: Values, units: Sequence[str]) -> dict[str, Sequence[str]]:
        """The members of these units on either side; methods may have been shown different people."""
        return {unit: sorted({*self.members[unit], *other.members[unit]}) for unit in units}

    def beyond(self, other: Values) -> Interval:
        """Difference of the means over units of their own, such as those of two groups of prompts."""
        own = [1.0] * len(self) + [0.0] * len(other)
        members = [values.members[unit] for values in (self, other) for unit in values.of]
        return slope(own, [*self.of.values(), *other.of.values()], members)


# By the first part of a measure's name, the one that has a value for each of its units; `pc` for the others.
# There is none for the router, whose images have no PC.
ALWAYS = {"swap": "swap_outside", "vary": "vary_clip", "router": ""}


class Measures:
    """`MEASURE` rows, to be asked for by metric, kind and method."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        self._all = list(rows)
        self._only: dict[str, int] = {}
        self._rows: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
        for row in self._all:
            self._rows.setdefault((row["kind"], row["metric"], row["method"]), []).append(row)

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        """(kind, metric, method) of all that there is, in the order of their names."""
        return iter(sorted(self._rows))

    def with_rows(self, rows: Iterable[Mapping[str, Any]]) -> Measures:
        """These measures and more of them."""
        return Measures([*self._all, *rows])

    def of_trainings(self, seeds: Mapping[str, int]) -> Measures:
        """The same measures, but of each method in `seeds` those of the training with that seed alone.

        Units without a value in one of its trainings are left out, so that all are of the same units.
        """
        chosen = copy.copy(self)
        chosen._only = dict(seeds)
        return chosen

    def seeds(self, kind: str, metric: str, method: str) -> set[int]:
        """Seeds of the trainings of which there is a value."""
        return {row["train_seed"] for row in self._rows.get((kind, metric, method), ())} - {None}

    def asked(self, kind: str, metric: str, method: str, group: str | None = None) -> set[str] | None:
        """The units that were made, with a value of the metric or not; None if that is unknown."""
        made = self.get(kind, ALWAYS.get(metric.split("_")[0], "pc"), method, group)
        return {*made.of, *self.get(kind, metric, method, group).of} if made else None

    def get(self, kind: str, metric: str, method: str, group: str | None = None) -> Values:
        """The values, of one group of prompts or of all; empty if nothing was measured."""
        values: dict[str, list[float]] = {}
        members: dict[str, Sequence[str]] = {}
        for row in self._chosen(kind, metric, method):
            if group in (None, row["group"]):
                values.setdefault(row["unit"], []).append(row["value"])
                members[row["unit"]] = row["members"]
        return Values({unit: float(np.mean(values[unit])) for unit in sorted(values)}, members)

    def _chosen(self, kind: str, metric: str, method: str) -> Rows:
        """The rows of all trainings, or of the one that was chosen."""
        rows = self._rows.get((kind, metric, method), [])
        if method not in self._only:
            return rows
        found: dict[str, set[int | None]] = {}
        for row in rows:
            found.setdefault(row["unit"], set()).add(row["train_seed"])
        every = set().union(*found.values())
        return [r for r in rows if r["train_seed"] == self._only[method] and found[r["unit"]] == every]
