"""The data card (what is in the records, what was left out and why) and a contact sheet to look at.

Entry point, called by `python -m moa card`:

    run(config, records, rejected, json_path, markdown, sheet, quarantined, phrases)      shards → three files
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from moa.choose import spread
from moa.data.crops import resize_ids
from moa.data.errors import REASONS, DataError
from moa.data.parser import PHRASES
from moa.data.records import RECORD, REJECTED, Row, count_rows, decode_image, decode_mask, each_row, read_at
from moa.data.sources.reasons import QUARANTINED
from moa.files import write_atomically

# Pixels of the shorter side; in the wild, no two photos' sizes are alike.
SIDES = (0, 64, 128, 256, 512, 768, 1024, 1536, 2048, 4096, 100_000)
EVERY_REASON = QUARANTINED | REASONS
DESCRIBED = [name for name in RECORD.names if name != "image"]  # columns that the card is made of
COLORS = ((230, 57, 70), (29, 120, 240), (255, 183, 3), (42, 157, 143), (155, 93, 229), (241, 91, 181))


@dataclass(frozen=True)
class CardConfig:
    """What the contact sheet shows."""

    images: int = 24  # photos on the sheet, spread evenly over the records
    columns: int = 4
    side: int = 160  # of a photo on the sheet, pixels

    def __post_init__(self) -> None:
        if min(self.images, self.columns, self.side) < 1:
            raise ValueError(f"{self}: every setting must be at least 1")


def histogram(values: Sequence[float], edges: Sequence[float]) -> dict[str, int]:
    """How many values lie from one edge up to the next; the last bin holds its upper edge, too."""
    counts, _ = np.histogram(np.asarray(values, float), np.asarray(edges, float))
    return {f"{a:g}–{b:g}": int(n) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)}


def areas(record: Row) -> list[float]:
    """The share of the photo that each subject covers."""
    counts = np.bincount(decode_mask(record["mask"]).ravel(), minlength=65536)
    total = record["width"] * record["height"]
    return [float(counts[segment["segment_id"]]) / total for segment in record["segments"]]


def hashed(record: Row) -> str:
    """The line of a record that goes into the data's hash: its photo, caption, mask and offsets."""
    mask = hashlib.sha256(record["mask"]).hexdigest()
    return json.dumps([record["id"], record["sha256"], record["caption"], record["segments"], mask])


def data_hash(lines: Iterable[str]) -> str:
    """SHA-256 over the `hashed` lines of all records, whatever their order."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


COUNTED: dict[str, Callable[[Row], list[Any]]] = {
    "splits": lambda record: [record["split"]],
    "sources": lambda record: [record["source"]],
    "subject_words": lambda record: [segment["word"].lower() for segment in record["segments"]],
    "subjects_per_photo": lambda record: [len(record["segments"])],
    "models": lambda record: [
        f"{record[f'{kind}_model']} @ {record[f'{kind}_revision']}" for kind in ("caption", "segment")
    ],
}


@dataclass
class Tally:
    """What is counted of records, of which none is kept."""

    records: int = 0
    counts: dict[str, Counter[Any]] = field(default_factory=lambda: {name: Counter() for name in COUNTED})
    sides: list[int] = field(default_factory=list)  # the shorter one of each photo, pixels
    words: list[int] = field(default_factory=list)  # of each caption
    areas: list[float] = field(default_factory=list)  # of each subject, shares of its photo
    lines: list[str] = field(default_factory=list)  # of the data's hash

    def add(self, record: Row) -> None:
        """Count a record; its column `image` is not looked at."""
        self.records += 1
        for name, values in COUNTED.items():
            self.counts[name].update(values(record))
        self.sides.append(min(record["width"], record["height"]))
        self.words.append(len(record["caption"].split()))
        self.areas += areas(record)
        self.lines.append(hashed(record))


def describe(
    records: Iterable[Row],
    rejected: Iterable[Row],
    quarantined: Iterable[Row] = (),
    phrases: Iterable[Row] = (),
) -> dict[str, Any]:
    """The card's content, ready for JSON, of rows that are looked at one after the other.

    Of records the columns `DESCRIBED` are read, of rejected and quarantined rows the reason, of phrases who
    found them, with which models.
    """
    tally = Tally()
    for record in tqdm(records, "count records", unit="photo"):
        tally.add(record)
    refused, aside = (Counter(row["reason"] for row in rows) for rows in (rejected, quarantined))
    reasons = refused + aside
    counts = {name: _sorted(counter) for name, counter in tally.counts.items()}
    return {
        "photos": tally.records + reasons.total(),
        "records": tally.records,
        "rejected": refused.total(),
        "quarantined": aside.total(),
        "splits": counts["splits"],
        "sources": counts["sources"],
        "reasons": {reason: reasons[reason] for reason in EVERY_REASON if reasons[reason]},
        "subjects": len(tally.areas),
        "subject_words": counts["subject_words"],
        "subjects_per_photo": counts["subjects_per_photo"],
        "shorter_side": histogram(tally.sides, SIDES),
        "caption_words": histogram(tally.words, (0, 5, 10, 15, 20, 30, 1000)),
        "subject_area": histogram(tally.areas, (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 1)),
        "models": counts["models"]
        | _sorted(
            Counter(f"{m['model']} @ {m['revision']}" for row in phrases for m in (row, *row["models"]))
        ),
        "sha256": data_hash(tally.lines),
    }


def _sorted(counter: Counter[Any]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(counter.items())}


def to_markdown(card: Mapping[str, Any]) -> str:
    """The card as a page of tables."""
    lines = ["# Data card", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in card.items() if not isinstance(value, dict)]
    for name, table in card.items():
        if isinstance(table, dict):
            title = name.replace("_", " ").capitalize()
            lines += ["", f"## {title}", "", f"| {title} | count |", "|---|---|"]
            lines += [f"| {_explained(name, key)} | {count} |" for key, count in table.items()]
    return "\n".join([*lines, ""])


def _explained(table: str, key: str) -> str:
    return f"{key}: {EVERY_REASON[key]}" if table == "reasons" else key


def overlay(photo: Image.Image, ids: np.ndarray, segment_ids: Sequence[int]) -> Image.Image:
    """The photo with every subject tinted: the first named red, the second blue, …"""
    pixels = np.asarray(photo).astype(np.float32)
    for number, segment in enumerate(segment_ids):
        inside = ids == segment
        pixels[inside] = 0.5 * pixels[inside] + 0.5 * np.array(COLORS[number % len(COLORS)], np.float32)
    return Image.fromarray(pixels.astype(np.uint8))


def tile(record: Row, side: int) -> Image.Image:
    """Photo, mask overlay, and the caption with each subject's word marked, as one picture."""
    photo = ImageOps.contain(decode_image(record["image"]), (side, side), Image.Resampling.LANCZOS)
    ids = resize_ids(decode_mask(record["mask"]), photo.size[::-1])
    x, y = (side - photo.width) // 2, (side - photo.height) // 2
    picture = Image.new("RGB", (2 * side, side + 64), "white")
    picture.paste(photo, (x, y))
    picture.paste(overlay(photo, ids, [s["segment_id"] for s in record["segments"]]), (side + x, y))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    lines = wrap(record["caption"], max(10, 2 * side // 6))[:3]
    draw.multiline_text((4, side + 3), "\n".join(lines), "black", font, spacing=2)
    left = 4.0
    for number, segment in enumerate(record["segments"]):
        word = f"{segment['word']} {segment['start']}:{segment['end']}"
        draw.text((left, side + 48), word, COLORS[number % len(COLORS)], font)
        left += draw.textlength(word + "   ", font)
    return picture


def shown(counts: Sequence[int], images: int) -> list[list[int]]:
    """For shards of so many records, the places in each whose records are shown, spread over all."""
    ends = list(accumulate(counts))
    chosen = spread(range(sum(counts)), images)
    return [
        [n - end + count for n in chosen if end - count <= n < end]
        for count, end in zip(counts, ends, strict=True)
    ]


def contact_sheet(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Equally large tiles, of which there is at least one, in so many columns at most."""
    columns = min(columns, len(tiles))
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * (width + 8), -(-len(tiles) // columns) * (height + 4)), "white")
    for place, picture in enumerate(tiles):
        sheet.paste(picture, (place % columns * (width + 8), place // columns * (height + 4)))
    return sheet


def draw_sheet(config: CardConfig, records: Sequence[str | Path], counts: Sequence[int]) -> Image.Image:
    """The contact sheet of shards of so many records; no more than the photos on it are in memory."""
    places = zip(records, shown(counts, config.images), strict=True)
    rows = (row for path, some in places for place in some for row in read_at(path, RECORD, [place]))
    return contact_sheet([tile(row, config.side) for row in rows], config.columns)


def run(
    config: CardConfig,
    records: Sequence[str | Path],
    rejected: Sequence[str | Path],
    json_path: str | Path,
    markdown: str | Path,
    sheet: str | Path,
    quarantined: Sequence[str | Path] = (),
    phrases: Sequence[str | Path] = (),
) -> None:
    """Describe all shards. Raises DataError for a bad shard, or with the reasons if no record is left."""
    counts = [count_rows(path, RECORD) for path in records]
    card = describe(
        each_row(records, RECORD, DESCRIBED),
        each_row(rejected, REJECTED, ["reason"]),
        each_row(quarantined, REJECTED, ["reason"]),
        each_row(phrases, PHRASES, ["model", "revision", "models"]),
    )
    if not card["records"]:  # said here, since Snakemake deletes what a job that fails has written
        raise DataError(
            f"no record to show: every photo was rejected {card['reasons']}; look at photos and annotators"
        )
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    write_atomically(json_path, lambda path: path.write_text(text, "utf-8"))
    write_atomically(markdown, lambda path: path.write_text(to_markdown(card), "utf-8"))
    write_atomically(sheet, lambda path: draw_sheet(config, records, counts).save(path))
