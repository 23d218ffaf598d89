"""The data card (what is in the records, what was left out and why) and a contact sheet to look at.

Entry point, called by `python -m moa card`:

    run(config, records, rejected, json_path, markdown, sheet, quarantined, phrases)      shards → three files
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from moa.choose import spread
from moa.data.crops import resize_ids
from moa.data.errors import REASONS, DataError
from moa.data.parser import PHRASES
from moa.data.records import RECORD, REJECTED, Row, decode_image, decode_mask, read_rows
from moa.data.sources.reasons import QUARANTINED
from moa.files import write_atomically

EVERY_REASON = QUARANTINED | REASONS
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


def shorter_sides(records: Sequence[Row]) -> dict[str, int]:
    """How many photos have a shorter side of so many pixels; in the wild hardly two have the same size."""
    sides = [min(record["width"], record["height"]) for record in records]
    return histogram(sides, (0, 64, 128, 256, 512, 768, 1024, 1536, 2048, 4096, 100_000))


def areas(record: Row) -> list[float]:
    """The share of the photo that each subject covers."""
    counts = np.bincount(decode_mask(record["mask"]).ravel(), minlength=65536)
    total = record["width"] * record["height"]
    return [float(counts[segment["segment_id"]]) / total for segment in record["segments"]]


def data_hash(records: Sequence[Row]) -> str:
    """SHA-256 over all records' photos, captions, masks and offsets, whatever their order."""
    lines = sorted(
        json.dumps([r["id"], r["sha256"], r["caption"], r["segments"], hashlib.sha256(r["mask"]).hexdigest()])
        for r in records
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def describe(
    records: Sequence[Row],
    rejected: Sequence[Row],
    quarantined: Sequence[Row] = (),
    phrases: Sequence[Row] = (),
) -> dict[str, Any]:
    """The card's content, ready for JSON."""
    subjects = [segment for record in records for segment in record["segments"]]
    reasons = Counter(row["reason"] for row in [*rejected, *quarantined])
    words = [len(record["caption"].split()) for record in records]
    return {
        "photos": len(records) + len(rejected) + len(quarantined),
        "records": len(records),
        "rejected": len(rejected),
        "quarantined": len(quarantined),
        "splits": _counts(record["split"] for record in records),
        "sources": _counts(record["source"] for record in records),
        "reasons": {reason: reasons[reason] for reason in EVERY_REASON if reasons[reason]},
        "subjects": len(subjects),
        "subject_words": _counts(segment["word"].lower() for segment in subjects),
        "subjects_per_photo": _counts(len(record["segments"]) for record in records),
        "shorter_side": shorter_sides(records),
        "caption_words": histogram(words, (0, 5, 10, 15, 20, 30, 1000)),
        "subject_area": histogram(
            [a for record in records for a in areas(record)], (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 1)
        ),
        "models": _counts(
            f"{record[f'{kind}_model']} @ {record[f'{kind}_revision']}"
            for kind in ("caption", "segment")
            for record in records
        )
        | _counts(f"{m['model']} @ {m['revision']}" for row in phrases for m in (row, *row["models"])),
        "sha256": data_hash(records),
    }


def _counts(values: Any) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


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


def contact_sheet(records: Sequence[Row], config: CardConfig) -> Image.Image:
    """Tiles of records, of which there is at least one, spread evenly over all."""
    tiles = [tile(record, config.side) for record in spread(records, config.images)]
    columns = min(config.columns, len(tiles))
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * (width + 8), -(-len(tiles) // columns) * (height + 4)), "white")
    for place, picture in enumerate(tiles):
        sheet.paste(picture, (place % columns * (width + 8), place // columns * (height + 4)))
    return sheet


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
    kept, refused = read_rows(records, RECORD), read_rows(rejected, REJECTED)
    card = describe(kept, refused, read_rows(quarantined, REJECTED), read_rows(phrases, PHRASES))
    if not kept:  # said here, since Snakemake deletes what a job that fails has written
        raise DataError(
            f"no record to show: every photo was rejected {card['reasons']}; look at photos and annotators"
        )
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    write_atomically(json_path, lambda path: path.write_text(text, "utf-8"))
    write_atomically(markdown, lambda path: path.write_text(to_markdown(card), "utf-8"))
    write_atomically(sheet, lambda path: contact_sheet(kept, config).save(path))
