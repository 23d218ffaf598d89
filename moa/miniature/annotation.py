"""How wrong the miniature's annotators are: captions, masks and records against the truth of the renderer.

Entry point, called by `python -m moa annotation`:

    run(config, raw, truth, captions, segments, records, train, output)      lists of shards → one CSV

The CSV has the columns `metric, value, count`; `count` is how many cases the value is a mean over or, where
it is a number, how many there are in all.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moa.data.align import AlignConfig, Aligner
from moa.data.errors import DataError, Rejected
from moa.data.phrases import clause, person_phrases
from moa.data.records import (
    CAPTION,
    RAW,
    RECORD,
    SEGMENT,
    TRUTH,
    Row,
    bounding_box,
    decode_mask,
    read_rows,
)
from moa.files import write_atomically
from moa.miniature import world

FIGURE_ATTRIBUTES = ("class", *world.APPEARANCE_ATTRIBUTES, "prop")
Facts = dict[str, str]
Cases = dict[str, list[float]]


# --- What a caption says ----------------------------------------------------------------------------------


@cache
def _colored(attribute: str, colors: str) -> list[tuple[str, re.Pattern[str]]]:
    """A pattern for every phrase of an attribute whose words hold the place of a colour."""
    vocabulary: dict[str, tuple[str, ...]] = getattr(world, attribute)
    words = "|".join(word for several in getattr(world, colors).values() for word in several)
    patterns = []
    for value, phrases in vocabulary.items():
        for phrase in phrases:
            pattern = re.escape(phrase).replace(r"\{color\}\ ", f"(?:(?P<color>{words}) )?")
            patterns.append((value, re.compile(r"\b" + re.sub(r"\ba\\ ", "an?\\\\ ", pattern) + r"\b")))
    return patterns


def _color(word: str, colors: str) -> str:
    return next(name for name, words in getattr(world, colors).items() if word in words)


def _find(text: str, kind: str, attribute: str, colors: str) -> Facts:
    """The value of an attribute and of its colour, as far as `text` names them."""
    for value, pattern in _colored(attribute, colors):
        found = pattern.search(text)
        if found:
            named = {f"{kind}_color": _color(found["color"], colors)} if found["color"] else {}
            return {kind: value} | named
    return {}


def _figure_facts(word: str, text: str) -> Facts:
    """What is said of one figure, whose class word is `word`."""
    facts: Facts = {"class": word} if word in ("man", "woman") else {}
    facts |= _find(text, "clothes", "CLOTHES", "CLOTHES_COLORS")
    bare = re.search(rf"\bin ({'|'.join(world.CLOTHES_COLORS)})(?=,|$)", text)
    if bare and "clothes" not in facts:
        facts["clothes_color"] = bare[1]
    for attribute, vocabulary in (("expression", world.EXPRESSIONS), ("prop", world.PROPS)):
        for value, words in vocabulary.items():
            if any(re.search(rf"\b{word}\b", text) for word in words):
                facts.setdefault(attribute, value)
    return facts


def read_facts(caption: str) -> tuple[list[Facts], Facts]:
    """What a task caption states: of each figure in its order, and of the background.

    The inverse of `captions.task_caption`, forgiving about everything it does not know.
    """
    caption = caption.replace(" - ", "-")  # "v - neck", as CLIP's tokenizer decodes it
    scene = _find(caption, "background", "BACKGROUNDS", "BACKGROUND_COLORS")
    people = person_phrases(caption)
    figures = [_figure_facts(p.word, clause(caption, people, i)) for i, p in enumerate(people)]
    return figures, scene


# --- Against the truth ------------------------------------------------------------------------------------


def _true_values(scene: world.Scene, figure: int) -> Facts:
    return {name: world.ATTRIBUTES[name][index] for name, index in world.labels(scene, figure).items()}


def _agreement(said: Facts, true: Facts) -> int:
    """Right statements less wrong ones."""
    return sum(1 if true[name] == value else -1 for name, value in said.items())


def whom(said: Sequence[Facts], true: Sequence[Facts]) -> tuple[int, ...]:
    """The true figure that each statement speaks of: the likeliest assignment, left to right when in doubt.

    Needs as many statements as figures.
    """
    orders = itertools.permutations(range(len(true)))
    return max(
        orders, key=lambda order: sum(_agreement(s, true[i]) for s, i in zip(said, order, strict=True))
    )


def _count_statement(cases: Cases, names: Sequence[str], said: Facts, true: Facts) -> None:
    """Whether each attribute is named, and where it is, whether rightly; no prop needs no mention."""
    for name in names:
        if name in said or true[name] != "none":
            cases.setdefault(f"caption.{name}.named", []).append(name in said)
        if name in said:
            cases.setdefault(f"caption.{name}.right", []).append(said[name] == true[name])


def caption_cases(caption: str | None, scene: world.Scene, cases: Cases) -> None:
    """Add what one caption gets right and wrong to `cases`."""
    figures, background = read_facts(caption or "")
    true = [_true_values(scene, i) for i in range(len(scene.identities))]
    cases.setdefault("caption.people.right", []).append(len(figures) == len(true))
    _count_statement(cases, world.BACKGROUND_ATTRIBUTES, background, true[0])
    if len(figures) == len(true):
        for said, figure in zip(figures, whom(figures, true), strict=True):
            _count_statement(cases, FIGURE_ATTRIBUTES, said, true[figure])


def overlaps(found: NDArray[Any], true: NDArray[Any], figures: int) -> NDArray[np.float64]:
    """Intersection over union [figures, S] of true figures 1…`figures` and found segments 1…S."""
    count = int(found.max(initial=0))
    table = np.zeros((figures, count))
    for i, j in itertools.product(range(figures), range(count)):
        a, b = true == i + 1, found == j + 1
        table[i, j] = (a & b).sum() / max(1, (a | b).sum())
    return table


def segment_cases(found: Row, true_mask: NDArray[Any], figures: int, cases: Cases) -> None:
    """Add one photo's masks: each figure's best overlap, 0 where nobody was found."""
    mask = decode_mask(found["mask"]) if found["mask"] else np.zeros_like(true_mask)
    table = overlaps(mask, true_mask, figures)
    best = table.max(1, initial=0.0)
    cases.setdefault("mask.iou", []).extend(best.tolist())
    cases.setdefault("mask.found", []).extend((best >= 0.5).tolist())
    cases.setdefault("mask.people.right", []).append(len(found["segments"]) == figures)


def alignment_cases(record: Row, scene: world.Scene, true_mask: NDArray[Any], cases: Cases) -> None:
    """Add one record: whether each phrase got the segment of the figure that it speaks of."""
    said, _ = read_facts(record["caption"])
    true = [_true_values(scene, i) for i in range(len(scene.identities))]
    if not len(said) == len(true) == len(record["segments"]):
        cases.setdefault("alignment.right", []).extend([False] * len(record["segments"]))
        return
    table = overlaps(decode_mask(record["mask"]), true_mask, len(true))
    for segment, figure in zip(record["segments"], whom(said, true), strict=True):
        column = table[:, segment["segment_id"] - 1]
        right = bool(column[figure] > 0 and column.argmax() == figure)
        cases.setdefault("alignment.right", []).append(right)
        if len(true) > 1:
            cases.setdefault("alignment.pairs.right", []).append(right)


def annotation_errors(
    truth: Sequence[Row], captions: Sequence[Row], segments: Sequence[Row], records: Sequence[Row]
) -> list[dict[str, Any]]:
    """Rows `metric, value, count` over all photos; `captions` and `segments` are in the order of `truth`.

    `caption.X.named`: share of figures of which X is said; `caption.X.right`: share of those said rightly;
    `mask.iou`: mean over true figures; `alignment.right`: share of phrases with the right segment;
    `records.kept`: share of photos that became records.
    """
    if not [r["id"] for r in truth] == [r["id"] for r in captions] == [r["id"] for r in segments]:
        raise DataError(
            "truth, captions and segments are about other photos; hand over the same shards of each"
        )
    scenes = {row["id"]: world.Scene.from_dict(json.loads(row["scene"])) for row in truth}
    masks = {row["id"]: decode_mask(row["mask"]) for row in truth}
    cases: Cases = {}
    for caption, segment in zip(captions, segments, strict=True):
        scene = scenes[caption["id"]]
        caption_cases(caption["caption"], scene, cases)
        segment_cases(segment, masks[segment["id"]], len(scene.identities), cases)
    for record in records:
        alignment_cases(record, scenes[record["id"]], masks[record["id"]], cases)
    kept = {record["id"] for record in records}
    cases["records.kept"] = [row["id"] in kept for row in truth]
    right = [v for name, values in cases.items() if _is_attribute(name) for v in values]
    cases["caption.all.right"] = right
    return [_summary(name, cases[name]) for name in sorted(cases) if cases[name]]


def true_segments(mask: NDArray[Any]) -> list[Row]:
    """What a faultless segmenter would say of a true mask [H, W]."""
    return [
        {
            "segment_id": figure,
            "label": "person",
            "score": 1.0,
            "bbox": bounding_box(mask == figure),
            "area": int((mask == figure).sum()),
        }
        for figure in range(1, int(mask.max(initial=0)) + 1)
    ]


def on_true_masks(
    aligner: Aligner, raw: Sequence[Row], truth: Sequence[Row], captions: Sequence[Row]
) -> list[Row]:
    """The records that alignment makes of these captions and the true masks; rejected photos have none."""
    records = []
    for photo, true, caption in zip(raw, truth, captions, strict=True):
        found = {"mask": true["mask"], "segments": true_segments(decode_mask(true["mask"]))}
        found |= {"problem": None, "model": "truth", "revision": ""}
        try:
            records.append(aligner("validation", photo, caption, found, aligner.phrases(caption)))
        except Rejected:
            continue
    return records


def alignment_errors(
    aligner: Aligner, raw: Sequence[Row], truth: Sequence[Row], captions: Sequence[Row]
) -> list[dict[str, Any]]:
    """Rows `metric, value, count` of alignment alone, without the segmenter's errors.

    `alignment.true_masks`: share of phrases with the right segment; `records.true_masks`: share of photos
    that became records. The captions are the captioner's.
    """
    if [row["id"] for row in raw] != [row["id"] for row in truth]:
        raise DataError("raw and truth are about other photos; hand over the same shards of each")
    records = on_true_masks(aligner, raw, truth, captions)
    cases: Cases = {}
    known = {row["id"]: row for row in truth}
    for record in records:
        true = known[record["id"]]
        scene = world.Scene.from_dict(json.loads(true["scene"]))
        alignment_cases(record, scene, decode_mask(true["mask"]), cases)
    kept = {record["id"] for record in records}
    named = {f"{name.removesuffix('.right')}.true_masks": values for name, values in cases.items()}
    named["records.true_masks"] = [row["id"] in kept for row in truth]
    return [_summary(name, values) for name, values in named.items() if values]


def in_both_splits(train: Sequence[Row], validation: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows `metric, value, count`: how many photos, and identities in them, both splits have, of how many."""

    def identities(rows: Sequence[Row]) -> set[str]:
        scenes = [world.Scene.from_dict(json.loads(row["scene"])) for row in rows]
        return {identity.id for scene in scenes for identity in scene.identities}

    def photos(rows: Sequence[Row]) -> set[str]:
        return {row["id"] for row in rows}

    found = []
    for name, of in (("identities", identities), ("photos", photos)):
        a, b = of(train), of(validation)
        found.append({"metric": f"splits.{name}.in_both", "value": len(a & b), "count": len(a | b)})
    return found


def _is_attribute(name: str) -> bool:
    return name.startswith("caption.") and name.endswith(".right") and name != "caption.people.right"


def _summary(name: str, values: Sequence[float]) -> dict[str, Any]:
    return {"metric": name, "value": round(float(np.mean(values)), 6), "count": len(values)}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the columns of the first one."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def run(
    config: AlignConfig,
    raw: Sequence[str | Path],
    truth: Sequence[str | Path],
    captions: Sequence[str | Path],
    segments: Sequence[str | Path],
    records: Sequence[str | Path],
    train: Sequence[str | Path],
    output: str | Path,
) -> None:
    """Compare shards with the truth. Raises DataError for a bad shard."""
    true, said = read_rows(truth, TRUTH), read_rows(captions, CAPTION)
    rows = annotation_errors(true, said, read_rows(segments, SEGMENT), read_rows(records, RECORD))
    rows += alignment_errors(Aligner.load(config), read_rows(raw, RAW), true, said)
    rows += in_both_splits(read_rows(train, TRUTH), true)
    rows.sort(key=lambda row: str(row["metric"]))
    write_atomically(output, lambda path: write_csv(path, rows))
