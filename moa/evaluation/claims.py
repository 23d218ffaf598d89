"""The `claims` stage: each claim of the paper beside what was measured, and whether it holds, by one rule.

config/claims.yaml names the measure, the effect and the bound of each. The rule: an effect's 95 % interval
lies wholly on the claimed side of the bound, and the claim holds; wholly on the other, and it does not; else
it is undecided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moa.config import load, read_list
from moa.data.errors import DataError
from moa.data.records import read_rows
from moa.evaluation import samples
from moa.evaluation.groups import ORDER, by_method
from moa.evaluation.measures import MEASURE, Measures, Values, everything
from moa.evaluation.statistics import Interval, interval, slope
from moa.evaluation.table import FORMS, Table, limits, save
from moa.trained import TRAINED

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
NOT_MEASURED, NOT_MEASURABLE = "not measured", "not measurable here"
SIGNS = {"above": "> ", "below": "< ", "apart": "beyond ±"}
ENDS = (
    "least, most: of the values with one training alone, of methods trained apart with each choice of one of "
    "either, where several differ in their seed. Only what has a value with each training is in them, so "
    "`value`, of all, may lie outside. The interval does not contain what another training moves.",
)
BANDS = 3  # of subjects' sizes, with equally many images of all methods


class NotMeasured(LookupError):
    """This run lacks what a claim needs."""


@dataclass(frozen=True)
class Claim:
    """A claim and its test: an effect, and the side of the bound on which it is claimed to lie.

    The effect is the mean of `metric`; with `minus`, its paired difference to that method; with `over`, the
    ratio of the means, with `over_metric`, that to the mean of another measure; with `slope_on`, its slope on
    that measure among images of the same prompt. With `versus`, it is the effect in `group` less that in the
    group `versus`.
    """

    claim: str  # in a few words
    section: str  # of the paper; "ours" if the paper does not say so
    metric: str = ""  # of docs/metrics.md; empty where nothing here can test the claim
    kind: str = "single"  # of the protocol
    method: str = "moa"
    minus: str | None = None  # a method
    over: str | None = None  # a method
    over_metric: str | None = None  # another measure of the same method
    slope_on: str | None = None  # a measure
    group: str | None = None  # of prompts; all if none is named
    versus: str | None = None  # another group
    side: Literal["above", "below", "apart"] = "above"
    bound: float = 0.0
    note: str = ""  # where a bound other than 0 comes from; why nothing can be measured

    def __post_init__(self) -> None:
        if (not self.metric or self.bound) and not self.note:
            raise ValueError(f"claim {self.claim!r} needs a note: why no metric, or where the bound is from")
        if sum(bool(name) for name in (self.minus, self.over, self.over_metric, self.slope_on)) > 1:
            raise ValueError(
                f"claim {self.claim!r}: give one of minus, over, over_metric and slope_on, not both"
            )
        if self.versus and (not self.group or self.over or self.over_metric or self.slope_on):
            raise ValueError(f"claim {self.claim!r}: versus needs a group, and neither over nor slope_on")
        if self.side == "apart" and self.bound <= 0:
            raise ValueError(f"claim {self.claim!r}: with no bound above 0, `apart` could never fail")

    @property
    def groups(self) -> tuple[str | None, ...]:
        """The groups of prompts to look at, None for all; of two, the second is subtracted."""
        return (self.group, self.versus) if self.versus else (self.group,)

    @property
    def effect(self) -> str:
        """What is compared with the bound."""
        if not self.metric:
            return ""
        against = f" − {self.minus}" if self.minus else f" / {self.over}" if self.over else ""
        of = f"slope of {self.metric} on {self.slope_on}" if self.slope_on else self.metric
        of += f" / {self.over_metric}" if self.over_metric else ""
        groups = " − ".join(name for name in (self.group, self.versus) if name)
        return f"{of}, {self.kind}{f' ({groups})' if groups else ''}: {self.method}{against}"


def read_claims(path: str | Path) -> list[Claim]:
    """Claims from YAML. Raises ValueError naming file and key of one that is mistyped."""
    return [load(Claim, entry, f"{path}[{n}]") for n, entry in enumerate(read_list(path))]


# --- Verdicts ---------------------------------------------------------------------------------------------


def verdict(effect: Interval, side: str, bound: float) -> str:
    """The rule; `apart` claims more than `bound` on either side.

    Limits that are NaN decide nothing: there are too few subjects, or a ratio is to what may be nothing.
    """
    if side == "apart":
        if effect.low > bound or effect.high < -bound:
            return HOLDS
        return FAILS if effect.low > -bound and effect.high < bound else UNDECIDED
    low, high = effect.low - bound, effect.high - bound
    if side == "below":
        low, high = -high, -low
    return HOLDS if low > 0 else FAILS if high < 0 else UNDECIDED


def effect_of(claim: Claim, measures: Measures) -> tuple[Interval, int]:
    """The effect and how many units it is from. Raises NotMeasured saying what is missing."""
    own, *rest = (values_of(claim, group, measures) for group in claim.groups)
    if rest:
        return own.beyond(rest[0]), len(own) + len(rest[0])
    if claim.slope_on:
        return slope_within_prompts(own, measures.get(claim.kind, claim.slope_on, claim.method, claim.group))
    if claim.over or claim.over_metric:
        metric, method = claim.over_metric or claim.metric, claim.over or claim.method
        other = measures.get(claim.kind, metric, method, claim.group)
        units = own.common(other)
        if not units:
            raise NotMeasured(f"no {metric} of {method}, {claim.kind}")
        if sum(other.of[unit] for unit in units) <= 0:
            raise NotMeasured(f"the mean {metric} of {method} is not above 0, so there is no share of it")
        return own.over(other), len(units)
    return own.mean(), len(own)


def values_of(claim: Claim, group: str | None, measures: Measures) -> Values:
    """The values of a group of prompts, with `minus` their paired differences."""
    where = f"{claim.kind} ({group})" if group else claim.kind
    own = measures.get(claim.kind, claim.metric, claim.method, group)
    if not own:
        raise NotMeasured(f"no {claim.metric} of {claim.method}, {where}")
    if not (against := claim.minus or claim.over):
        return own
    other = measures.get(claim.kind, claim.metric, against, group)
    if not own.common(other):
        raise NotMeasured(f"no {claim.metric} of {against}, {where}")
    return own.less(other) if claim.minus else own


def slope_within_prompts(y: Values, x: Values) -> tuple[Interval, int]:
    """Slope of y on x over images with both, less each prompt's means; or raises NotMeasured."""
    units = y.common(x)
    prompts = [unit.split("/")[-2] for unit in units]
    if len(units) < 2:
        raise NotMeasured("fewer than two images with both measures")
    a, b = ([values.of[unit] for unit in units] for values in (x, y))
    try:
        return slope(a, b, [y.members[unit] for unit in units], prompts), len(units)
    except ValueError as error:
        raise NotMeasured("no two images of a prompt differ in size") from error


def left_out(claim: Claim, units: int, measures: Measures) -> int | None:
    """How many units all that the claim compares have made, but without a value; None if that is unknown."""
    made = 0
    for group in claim.groups:
        methods = [method for method in (claim.method, claim.minus, claim.over) if method]
        asked = [measures.asked(claim.kind, claim.metric, method, group) for method in methods]
        if None in asked:
            return None
        made += len(set.intersection(*filter(None, asked)))
    return made - units


def ends(values: Sequence[float]) -> dict[str, float]:
    """least and most of the values by training; nothing if there are fewer than two."""
    return {"least": min(values), "most": max(values)} if len(values) > 1 else {}


def choices(claim: Claim, measures: Measures) -> list[dict[str, int]]:
    """Each choice of one training, by its seed, of every trained method of a claim.

    Trainings are taken seed by seed where methods have the same weights, or were measured with one mask.
    """
    methods = dict.fromkeys(method for method in (claim.method, claim.minus, claim.over) if method)
    found = {method: measures.seeds(claim.kind, claim.metric, method) for method in methods}
    seeds = {method: sorted(own) for method, own in found.items() if own}
    if claim.metric.endswith("_shared") or len({TRAINED.get(method, method) for method in seeds}) == 1:
        common = set.intersection(*map(set, seeds.values())) if seeds else set()
        return [dict.fromkeys(seeds, seed) for seed in sorted(common)]
    return [dict(zip(seeds, choice, strict=True)) for choice in product(*seeds.values())]


def by_training(claim: Claim, measures: Measures) -> list[float]:
    """The effect with each of the `choices`; nothing if one of them lacks what the claim needs."""
    try:
        return [effect_of(claim, measures.of_trainings(seeds))[0].mean for seeds in choices(claim, measures)]
    except NotMeasured:
        return []


def judge(claim: Claim, measures: Measures) -> dict[str, Any]:
    """A row of the ledger."""
    row: dict[str, Any] = {"claim": claim.claim, "section": claim.section, "note": claim.note}
    if not claim.metric:
        return row | {"verdict": NOT_MEASURABLE}
    bound = f"{SIGNS[claim.side]}{claim.bound:g}".replace("-", "−")
    row |= {"effect": claim.effect, "holds_if": bound}
    try:
        effect, units = effect_of(claim, measures)
    except NotMeasured as missing:
        return row | {"verdict": NOT_MEASURED, "note": "; ".join(filter(None, (str(missing), claim.note)))}
    row |= {"units": units, "left_out": left_out(claim, units, measures)} | limits("value", effect)
    row |= ends(by_training(claim, measures))
    return row | {"verdict": verdict(effect, claim.side, claim.bound)}


def ledger(claims: Sequence[Claim], measures: Measures) -> Table:
    """One row for each claim."""
    rows = [judge(claim, measures) for claim in claims]
    about, value = ("claim", "section", "effect", "units", "left_out"), ("value", "value_low", "value_high")
    columns = (*about, *value, *shown_ends(rows), "holds_if", "verdict", "note")
    notes = (
        "A claim holds if the effect's whole 95 % interval, over subjects, is on the claimed side of the "
        "bound, does not hold if it is wholly on the other, and is undecided if the bound lies inside.",
        "Left out: images, or pairs, that were made but have no value, for nobody was found, or too little "
        "is beside them. Section: of the paper; `ours` where the paper does not say so.",
        "Claims about the router, and about ablations (`moa:...`), are of validation subjects and of one "
        "training; the others of test subjects.",
        *(ENDS if shown_ends(rows) else ()),
        "Not measured: this run lacks the images. Not measurable here: nothing in this project tests it.",
    )
    return Table(columns, rows, notes)


def shown_ends(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The columns of `ends`, if some row has them."""
    return ("least", "most") if any("least" in row for row in rows) else ()


# --- The measures themselves ------------------------------------------------------------------------------


def overview(measures: Measures) -> Table:
    """Mean and interval of every measure, by kind and method."""
    table = []
    for kind, metric, method in sorted(measures, key=lambda key: (*key[:2], _rank(key[2]))):
        values = measures.get(kind, metric, method)
        about = {"kind": kind, "metric": metric, "method": method, "units": len(values)}
        alone = by_training(Claim("", "", metric, kind, method), measures)
        table.append(about | limits("value", values.mean()) | ends(alone))
    columns = ("kind", "metric", "method", "units", "value", "value_low", "value_high", *shown_ends(table))
    note = "docs/metrics.md has the formulas. Units: images, or pairs of images, that have a value."
    return Table(columns, table, (note, *(ENDS if shown_ends(table) else ())))


def _rank(method: str) -> tuple[int, str]:
    return ORDER.index(method) if method in ORDER else len(ORDER), method


def by_size(rows: Sequence[Mapping[str, Any]]) -> Table:
    """IP by the subject's size, in bands that hold equally many found images of all methods of a kind."""
    table = []
    for kind in sorted({row["kind"] for row in rows}):
        own = [row for row in rows if row["kind"] == kind and row["found"]]
        edges = np.quantile([row["face_size"] for row in own], np.linspace(0, 1, BANDS + 1)) if own else ()
        for method, every in by_method(own).items():
            bands = np.digitize([row["face_size"] for row in every], edges[1:-1])
            for band in range(BANDS):
                part = [row for row, b in zip(every, bands, strict=True) if b == band]
                about = {"kind": kind, "method": method, "images": len(part)}
                sizes = {"size_from": float(edges[band]), "size_to": float(edges[band + 1])}
                scores = [row["ip"] for row in part]
                ip = interval(scores, [row["members"] for row in part]) if part else None
                table.append(about | sizes | (limits("ip", ip) if ip else {}))
    columns = ("kind", "method", "size_from", "size_to", "images", "ip", "ip_low", "ip_high")
    return Table(columns, table)


# --- The stage --------------------------------------------------------------------------------------------


def tabulate(
    claims: str | Path,
    sample_files: Sequence[str | Path],
    output: str | Path,
    kept: Sequence[str | Path] = (),
    measured: Sequence[str | Path] = (),
    preserved: Sequence[str | Path] = (),
    router: Sequence[str | Path] = (),
    alike: Sequence[str | Path] = (),
    ablations: Sequence[str | Path] = (),
    split: str = "test",
) -> None:
    """Write claims.{csv,md,tex}, metrics.{csv,md,tex} and sizes.csv into folder `output`.

    Args:
        claims: config/claims.yaml.
        sample_files: scored rows.
        output: folder.
        kept: the file of `moa.evaluation.swaps.compare_swaps`; what the files left out would show is not
            measured.
        measured: those of `moa.evaluation.measures.measure` and `moa.evaluation.shared.compare`.
        preserved: files of `moa.evaluation.preserved.compare`, if there is a prior.
        router: the file of `moa.evaluation.router.record`, if there is a router.
        alike: likewise that of `moa.evaluation.alike`.
        ablations: the measures of `moa.evaluation.ablations`, of validation subjects, if there are any.
        split: whose images.

    Raises:
        DataError: no samples of that split, or a broken file. ValueError: a mistyped claim.
    """
    rows = [row for row in samples.read(sample_files) if row["split"] == split]
    if not rows:
        raise DataError(f"no samples of split {split}: generate and score its images first")
    measures = everything(sample_files, kept, measured, preserved, router, alike, split)
    ablated = read_rows(ablations, MEASURE)
    for name, table in {
        "claims": ledger(read_claims(claims), measures.with_rows(ablated)),
        "metrics": overview(measures),
    }.items():
        for form in FORMS:
            save(table, Path(output) / f"{name}{form}")
    save(by_size(rows), Path(output) / "sizes.csv")
