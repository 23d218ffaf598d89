"""FastComposer's published archive: read into records, and written from them.

Entry points, called by `python -m moa archive-records`, `export-archive` and `restore-archive`:

    run(config, split, raw, root, lock, records, rejected, archived)     a raw shard and the archive → records
    export(records, output)                                         records → an archive
    restore(raw, archived, output)                                  photos of an archive → the same archive

The archive is `image_ids.txt`, `image_ids_train.txt`, `image_ids_test.txt`, and for each id
`<first five characters>/<id>.jpg`, `.json` (caption, segments) and `.npy` (id map [H, W]). Its segments
name a phrase each; its test photos are our validation photos. A record holds what training reads of them;
`ARCHIVED` holds the files themselves, so that nothing of an archive is lost by taking it in.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

from moa.data.align import (
    AlignConfig,
    by_id,
    check_number,
    check_rejected,
    check_tokens,
    check_visible,
    large_enough,
    load_tokenizer,
)
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
    sha256,
    write_rows,
)
from moa.data.sources.archive import read_annotation
from moa.data.sources.listing import archive_file, read_ids
from moa.data.sources.lock import read_lock
from moa.files import write_atomically

SPLITS = {"train": "train", "validation": "test"}  # ours: the archive's
LISTS = {"all": "image_ids.txt", "train": "image_ids_train.txt", "test": "image_ids_test.txt"}
ORIENTATION = 0x0112  # EXIF
ARCHIVED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("annotation", pa.binary(), nullable=False),  # the .json
        pa.field("mask", pa.binary(), nullable=False),  # the .npy, compressed by zlib
        *(pa.field(name, pa.list_(pa.int32()), nullable=False) for name in LISTS),  # places in the lists
    ],
    metadata={"moa_schema": "archived/1"},
)


# --- Reading ----------------------------------------------------------------------------------------------


def locked(root: Path, name: str, hashes: Mapping[str, str]) -> bytes:
    """The bytes of one of the archive's files. Raises DataError unless they are those of the lock."""
    data = (root / name).read_bytes()
    if sha256(data) != hashes.get(name):
        raise DataError(
            f"{root / name} is not the file of the archive's lock; put the old one back, or, if the change "
            "is meant, run `python -m moa lock-photos --accept` (docs/data.md)"
        )
    return data


def record(raw: Row, root: Path, split: str, hashes: Mapping[str, str]) -> Row:
    """The record of a raw photo with all that the archive says about it.

    Raises as `read_annotation`, and DataError for files that are not those of the lock, `hashes` by name.
    """
    caption, segments, ids = read_annotation(root, raw["id"], (raw["height"], raw["width"]))
    revisions: dict[str, str] = {}
    for kind, suffix in (("caption", ".json"), ("segment", ".npy")):
        data = locked(root, archive_file(raw["id"], suffix), hashes)
        revisions |= {
            f"{kind}_model": raw["source"],
            f"{kind}_revision": f"sha256:{sha256(data)[:16]}",
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
    """The record with its persons alone, in the caption's order. Raises Rejected if it is of no use."""
    ids = decode_mask(row["mask"])
    persons = [segment for segment in row["segments"] if segment["label"] == "person"]
    persons.sort(key=lambda segment: (segment["end"], segment["start"]))  # the archive need not
    if not persons:
        raise Rejected("no_segment", f"the archive names nobody: {row['caption']!r}")
    found = [segment | {"area": int((ids == segment["segment_id"]).sum())} for segment in persons]
    if len(large_enough(found, ids.size, config)) < len(persons):
        raise Rejected("too_small", f"areas {[segment['area'] for segment in found]} of {ids.size} pixels")
    check_number(len(persons), config)
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


def places(root: Path) -> dict[str, dict[str, list[int]]]:
    """For each of `LISTS` where in it the archive's ids stand, from 0. Raises DataError for no UTF-8."""
    found: dict[str, dict[str, list[int]]] = {name: {} for name in LISTS}
    for name, file in LISTS.items():
        for place, photo in enumerate(read_ids(root / file)):
            found[name].setdefault(photo, []).append(place)
    return found


def as_it_was(
    photo: str, root: Path, listed: Mapping[str, Mapping[str, list[int]]], hashes: Mapping[str, str]
) -> Row:
    """A photo's row of `ARCHIVED`: the bytes of its annotation and mask, and its places in the lists.

    Raises DataError for files that are not those of the lock, `hashes` by name.
    """
    about, mask = (locked(root, archive_file(photo, suffix), hashes) for suffix in (".json", ".npy"))
    where = {name: listed[name].get(photo, []) for name in LISTS}
    return {"id": photo, "annotation": about, "mask": zlib.compress(mask), **where}


def run(
    config: AlignConfig,
    split: Literal["train", "validation"],
    raw: Path,
    root: Path,
    lock: Path,
    records: Path,
    rejected: Path,
    archived: Path,
) -> None:
    """Turn a raw shard of an archive's photos into records with the archive's captions and masks.

    `archived` keeps the archive's own files of all photos, rejected or not. Raises DataError for a bad shard,
    an annotation or mask that is not the lock's, and if more than `max_rejected` of the shard was
    rejected; the rejected rows are written even then.
    """
    tokenizer = load_tokenizer(config)
    _, _, hashes = read_lock(lock)
    kept: list[Row] = []
    refused: list[Row] = []
    photos = read_rows(raw, RAW)
    for photo in tqdm(photos, desc=f"archive {raw.stem}", unit="photo"):
        try:
            kept.append(people(record(photo, root, split, hashes), tokenizer, config))
        except Rejected as why:
            refused.append({"id": photo["id"], "reason": why.reason, "detail": why.detail})
    write_rows(rejected, refused, REJECTED)
    check_rejected(raw, photos, refused, config)
    listed = places(root)
    write_rows(archived, (as_it_was(photo["id"], root, listed, hashes) for photo in photos), ARCHIVED)
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


def write_photo(root: Path, photo: str, image: bytes, about: bytes, mask: bytes) -> None:
    """Write the .jpg, .json and .npy of a photo. Raises DataError for an id that is no plain file name."""
    if not photo or "/" in photo or photo.startswith("."):
        raise DataError(f"{photo!r} cannot be a file's name in an archive; set data.photos.ids to name")
    for suffix, data in ((".jpg", image), (".json", about), (".npy", mask)):
        path = root / archive_file(photo, suffix)
        write_atomically(path, lambda temporary, data=data: temporary.write_bytes(data))  # type: ignore[misc]


def write_record(root: Path, row: Row) -> None:
    """Write the three files of a record. Raises DataError for an id that is no plain file name."""
    mask = io.BytesIO()
    np.save(mask, decode_mask(row["mask"]))
    about = json.dumps(annotation(row), ensure_ascii=False).encode()
    write_photo(root, row["id"], image_bytes(row), about, mask.getvalue())


def write_list(root: Path, name: str, ids: Sequence[str]) -> None:
    """Write one of `LISTS`."""
    text = "".join(f"{photo}\n" for photo in ids)
    write_atomically(root / LISTS[name], lambda path: path.write_text(text, "utf-8"))


def check_new(output: Path) -> None:
    """Raise DataError if there is an archive already."""
    if any((output / file).exists() for file in LISTS.values()):
        raise DataError(f"{output} holds an archive, whose lists of ids would be lost; name another folder")


def export(records: Sequence[Path], output: Path) -> None:
    """Write records as an archive that FastComposer's loader reads; the lists of ids come last.

    Its loader wants ids that are numbers. Raises DataError for bad shards, an id that comes twice, one that
    is no file name, or an archive that is there already.
    """
    check_new(output)
    lists: dict[str, list[str]] = {name: [] for name in LISTS}
    for shard in tqdm(list(records), desc="export", unit="shard"):
        for row in read_rows(shard, RECORD):
            write_record(output, row)
            lists["all"].append(row["id"])
            lists[SPLITS[row["split"]]].append(row["id"])
    if len(set(lists["all"])) < len(lists["all"]):
        raise DataError("an id comes twice in these records; give every shard once")
    for name, ids in lists.items():
        write_list(output, name, sorted(ids))


def restore(raw: Sequence[Path], archived: Sequence[Path], output: Path) -> None:
    """Write the photos of an archive as they were taken in: files byte for byte, the lists in their order.

    Photos in quarantine are left out, and lists in which none of the others stands. Raises DataError for bad
    shards, or an archive that is there already.
    """
    check_new(output)
    if len(raw) != len(archived):
        raise DataError(f"{len(raw)} raw and {len(archived)} archived shards; give the same ones of both")
    lists: dict[str, dict[int, str]] = {name: {} for name in LISTS}
    for shard, kept in tqdm(list(zip(raw, archived, strict=True)), desc="restore", unit="shard"):
        photos = read_rows(shard, RAW)
        rows = by_id(read_rows(kept, ARCHIVED), [photo["id"] for photo in photos], kept)
        for photo in photos:
            row = rows[photo["id"]]
            files = photo["image"]["bytes"], row["annotation"], zlib.decompress(row["mask"])
            write_photo(output, photo["id"], *files)
            for name in LISTS:
                lists[name] |= dict.fromkeys(row[name], photo["id"])
    for name, ids in lists.items():
        if ids:
            write_list(output, name, [ids[place] for place in sorted(ids)])
