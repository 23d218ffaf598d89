"""FastComposer's published archive: read into records, and written from them.

Entry points, called by `python -m moa archive-records` and `python -m moa export-archive`:

    run(config, split, raw, root, records, rejected)      a raw shard and the archive's annotations → records
    export(records, output)                               records → an archive

The archive is `image_ids.txt`, `image_ids_train.txt`, `image_ids_test.txt`, and for each id
`<first five characters>/<id>.jpg`, `.json` (caption, segments) and `.npy` (id map [H, W]). Its segments
name a phrase each; its test photos are our validation photos.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers import AutoTokenizer

from moa.data.align import AlignConfig, check_rejected, check_tokens, check_visible, large_enough
from moa.data.annotators import load
from moa.data.errors import DataError, Rejected
from moa.data.phrases import Phrase
from moa.data.records import (
    RAW,
    RECORD,
    REJECTED,
    Row,
    decode_image,
    decode_mask,
    encode_image,
    encode_mask,
    read_rows,
    write_rows,
)
from moa.data.sources.archive import read_annotation
from moa.data.sources.listing import archive_file
from moa.files import write_atomically

SPLITS = {"train": "train", "validation": "test"}  # ours: the archive's
ORIENTATION = 0x0112  # EXIF


# --- Reading ----------------------------------------------------------------------------------------------


def record(raw: Row, root: Path, split: str) -> Row:
    """The record of a raw photo with all that the archive says about it. Raises as `read_annotation`."""
    caption, segments, ids = read_annotation(root, raw["id"], (raw["height"], raw["width"]))
    revisions: dict[str, str] = {}
    for kind, suffix in (("caption", ".json"), ("segment", ".npy")):
        data = (root / archive_file(raw["id"], suffix)).read_bytes()
        revisions |= {
            f"{kind}_model": raw["source"],
            f"{kind}_revision": f"sha256:{hashlib.sha256(data).hexdigest()[:16]}",
        }
    known = {name: raw[name] for name in ("id", "image", "width", "height", "source", "sha256")}
    return {
        **known,
        **revisions,
        "caption": caption,
        "segments": segments,
        "mask": encode_mask(ids),
        "split": split,
    }


def people(row: Row, tokenizer: Any, config: AlignConfig) -> Row:
    """The record with its persons alone. Raises Rejected where training could not use it."""
    ids = decode_mask(row["mask"])
    persons = [segment for segment in row["segments"] if segment["label"] == "person"]
    if not persons:
        raise Rejected("no_segment", f"the archive names nobody: {row['caption']!r}")
    found = [segment | {"area": int((ids == segment["segment_id"]).sum())} for segment in persons]
    if len(large_enough(found, ids.size, config)) < len(persons):
        raise Rejected("too_small", f"areas {[segment['area'] for segment in found]} of {ids.size} pixels")
    phrases = [Phrase(segment["word"], segment["start"], segment["end"]) for segment in persons]
    if len({phrase.end for phrase in phrases}) < len(phrases):
        raise Rejected("plural", f"two segments share a phrase in {row['caption']!r}")
    wrong = [p.word for p in phrases if row["caption"][p.end - len(p.word) : p.end] != p.word]
    if wrong:
        raise Rejected("no_person_word", f"{wrong} do not end where their phrases end in {row['caption']!r}")
    check_tokens(tokenizer, row["caption"], phrases)
    check_visible(persons, ids)
    kept = np.where(np.isin(ids, [segment["segment_id"] for segment in persons]), ids, 0)
    return row | {"segments": persons, "mask": encode_mask(kept)}


def run(
    config: AlignConfig,
    split: Literal["train", "validation"],
    raw: Path,
    root: Path,
    records: Path,
    rejected: Path,
) -> None:
    """Turn a raw shard of an archive's photos into records with the archive's captions and masks.

    Raises DataError for a bad shard, an annotation that changed since the shard was made, and if more than
    `max_rejected` of the shard was rejected; the rejected rows are written even then.
    """
    tokenizer = load(AutoTokenizer, config.tokenizer, "prior", subfolder=config.tokenizer_subfolder)
    kept: list[Row] = []
    refused: list[Row] = []
    photos = read_rows(raw, RAW)
    for photo in tqdm(photos, desc=f"archive {raw.stem}", unit="photo"):
        try:
            kept.append(people(record(photo, root, split), tokenizer, config))
        except Rejected as why:
            refused.append({"id": photo["id"], "reason": why.reason, "detail": why.detail})
    write_rows(rejected, refused, REJECTED)
    check_rejected(raw, photos, refused, config)
    write_rows(records, kept, RECORD)


# --- Writing ----------------------------------------------------------------------------------------------


def image_bytes(row: Row) -> bytes:
    """What the archive's .jpg holds: an upright JPEG as it is, any other photo as lossless PNG.

    FastComposer's loader tells them apart by content, and turns no photo upright.
    """
    picture = Image.open(io.BytesIO(row["image"]["bytes"]))
    upright = picture.getexif().get(ORIENTATION, 1) == 1
    if picture.format in ("JPEG", "MPO") and picture.mode in ("RGB", "L") and upright:
        return bytes(row["image"]["bytes"])
    return bytes(encode_image(decode_image(row["image"]))["bytes"])


def annotation(row: Row) -> dict[str, Any]:
    """What the archive's .json holds."""
    segments = [
        {
            "id": segment["segment_id"],
            "word": segment["word"],
            "start": segment["start"],
            "end": segment["end"],
            "bbox": segment["bbox"],
            "coco_label": segment["label"],
        }
        for segment in row["segments"]
    ]
    return {"caption": row["caption"], "segments": segments}


def write_record(root: Path, row: Row) -> None:
    """Write the three files of a record. Raises DataError for an id that is no plain file name."""
    if not row["id"] or "/" in row["id"] or row["id"].startswith("."):
        raise DataError(f"{row['id']!r} cannot be a file's name in an archive; set data.photos.ids to name")
    image, about, mask = (root / archive_file(row["id"], suffix) for suffix in (".jpg", ".json", ".npy"))
    data, text = image_bytes(row), json.dumps(annotation(row), ensure_ascii=False)
    write_atomically(image, lambda path: path.write_bytes(data))
    write_atomically(about, lambda path: path.write_text(text, "utf-8"))
    ids = decode_mask(row["mask"])
    write_atomically(mask, lambda path: np.save(path, ids))


def export(records: Sequence[Path], output: Path) -> None:
    """Write records as an archive that FastComposer's loader reads; the lists of ids come last.

    Its loader wants ids that are numbers. Raises DataError for bad shards, an id that comes twice, one that
    is no file name, or an archive that is there already.
    """
    if (output / "image_ids.txt").exists():
        raise DataError(f"{output} holds an archive, whose lists of ids would be lost; name another folder")
    lists: dict[str, list[str]] = {"": [], **{name: [] for name in SPLITS.values()}}
    for shard in tqdm(list(records), desc="export", unit="shard"):
        for row in read_rows(shard, RECORD):
            write_record(output, row)
            lists[""].append(row["id"])
            lists[SPLITS[row["split"]]].append(row["id"])
    if len(set(lists[""])) < len(lists[""]):
        raise DataError("an id comes twice in these records; give every shard once")
    for name, ids in lists.items():
        text = "".join(f"{photo}\n" for photo in sorted(ids))
        write_atomically(
            output / f"image_ids{name and '_'}{name}.txt",
            lambda path, text=text: path.write_text(text, "utf-8"),  # type: ignore[misc]
        )
