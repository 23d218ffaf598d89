"""FastComposer's archive: what is read is what is written, its lists decide who is held out."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moa.data import archive
from moa.data.align import AlignConfig
from moa.data.errors import DataError
from moa.data.records import RAW, RECORD, REJECTED, decode_image, decode_mask, read_rows, write_rows
from moa.data.sources import listing, lock
from tests.data.files import config, encoded, ingest, turned

ONE = {"train": 1, "validation": 1}
CAPTION = "a man and a young woman with a tie"


def segment(number: int, word: str, phrase: str, label: str = "person") -> dict:
    start = CAPTION.index(phrase)
    box = [8 * number, 2, 8 * number + 8, 20]
    return {
        "id": number,
        "word": word,
        "start": start,
        "end": start + len(phrase),
        "bbox": box,
        "coco_label": label,
    }


SEGMENTS = [
    segment(1, "man", "a man"),
    segment(2, "woman", "a young woman"),
    segment(0, "tie", "a tie", "tie") | {"id": 7},
]


def add(root: Path, photo: str, kind: str = "JPEG", **changes) -> None:
    """Three files, as FastComposer published them."""
    (root / photo[:5]).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(int(photo)).integers(0, 256, (24, 32, 3), np.uint8)
    ids = np.zeros((24, 32), np.int32)
    for item in SEGMENTS:
        x1, y1, x2, y2 = item["bbox"]
        ids[y1:y2, x1:x2] = item["id"]
    about = {"caption": CAPTION, "segments": SEGMENTS} | changes
    (root / photo[:5] / f"{photo}.jpg").write_bytes(encoded(Image.fromarray(pixels), kind))
    (root / photo[:5] / f"{photo}.json").write_text(json.dumps(about))
    np.save(root / photo[:5] / f"{photo}.npy", ids)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    top = tmp_path / "archive"
    ids = ["0000000", "0000001", "0000002", "0100003"]
    for photo in ids:
        add(top, photo)
    for name, part in (("", ids), ("_train", ids[:3]), ("_test", ids[3:])):
        (top / f"image_ids{name}.txt").write_text("".join(f"{photo}\n" for photo in part))
    return top


def files(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def lock_of(root: Path) -> Path:
    return config(root, "fastcomposer").lock


def read(root: Path, out: Path) -> list[Path]:
    """The archive as shards of records with all that it says."""
    ingest(config(root, "fastcomposer"), out, ONE)
    _, _, hashes = lock.read_lock(lock_of(root))
    paths = []
    for split in ONE:
        photos = read_rows(out / f"raw-{split}-0.parquet", RAW)
        rows = [archive.record(row, root, split, hashes) for row in photos]
        paths.append(out / f"records-{split}.parquet")
        write_rows(paths[-1], rows, RECORD)
    return paths


# As published archives may be: any whole numbers, any layout of JSON, any order, and more than we ask for.
DTYPES = (np.uint8, np.uint16, np.int16, np.int32, np.uint32, np.int64, np.dtype(">i4"))
CAPTIONS = (CAPTION, CAPTION + " in a café", CAPTION + ", 微笑 😀")
TIES = [SEGMENTS[2], SEGMENTS[2] | {"id": 0, "coco_label": "Krawatte à pois"}]


def odd_photo(root: Path, photo: str, rng: np.random.Generator) -> None:
    """One photo of an archive as nobody would write it who follows our exporter."""
    segments = [dict(item) for item in SEGMENTS[:2] + TIES]
    segments[1]["bbox"] = [8.25, 2.5, 15.5, 20.0]
    segments[2]["score"] = 0.123456789012345678
    segments = [segments[i] for i in rng.permutation(len(segments))][: int(rng.integers(1, 5))]
    for item in segments:
        for key in rng.permutation(list(item)):
            item[str(key)] = item.pop(str(key))
    add(root, photo, ("JPEG", "PNG")[int(rng.integers(2))])
    about = {"segments": segments, "caption": CAPTIONS[int(rng.integers(3))], "model": {"n": [1, None, 1e-9]}}
    text = json.dumps(about, ensure_ascii=bool(rng.integers(2)), indent=[None, 2][int(rng.integers(2))])
    place = root / photo[:5] / photo
    place.with_suffix(".json").write_bytes(text.replace("\n", "\r\n").encode())
    ids = np.load(place.with_suffix(".npy")).astype(DTYPES[int(rng.integers(len(DTYPES)))])
    np.save(place.with_suffix(".npy"), ids if rng.random() < 0.5 else np.asfortranarray(ids))


@pytest.mark.parametrize("seed", range(6))
def test_an_archive_comes_out_as_it_went_in(seed, tmp_path, tokenizer):
    """Through the stages, whatever became a record: bytes of photos, JSON and masks, and the lists' order."""
    rng = np.random.default_rng(seed)
    root, out = tmp_path / "archive", tmp_path / "out"
    ids = [f"{number:07d}" for number in rng.permutation(10**7)[:9]]
    for photo in ids:
        odd_photo(root, photo, rng)
    add(root, ids[-2], segments=TIES)  # no record comes of it
    held_out = int(rng.integers(1, 8)) if seed else 0  # the first archive has no lists of its own splits
    parts = {"": ids[:-1], "_train": ids[held_out:], "_test": ids[:held_out]} if seed else {"": ids}
    for name, part in parts.items():
        (root / f"image_ids{name}.txt").write_text("".join(f"{photo}\n" for photo in rng.permutation(part)))

    _, aside = ingest(config(root, "fastcomposer"), out, ONE)
    assert not aside
    raw = [out / f"raw-{split}-0.parquet" for split in ONE]
    kept, archived = 0, []
    for split, path in zip(ONE, raw, strict=True):
        outputs = [out / f"{kind}-{split}.parquet" for kind in ("records", "rejected", "archived")]
        archive.run(AlignConfig(tokenizer, "", max_rejected=1.0), split, path, root, lock_of(root), *outputs)
        archived.append(outputs[2])
        kept += len(read_rows(outputs[0], RECORD))
    assert 0 < kept < 9, "both kept and rejected photos must be among them"
    archive.restore(raw, archived, tmp_path / "again")
    assert files(tmp_path / "again") == files(root)


def test_ties_and_dtypes_are_what_records_lose(root, tmp_path):
    """Why `restore` is there: what is exported of records is what training reads."""
    odd_photo(root, "0000001", np.random.default_rng(0))
    archive.export(read(root, tmp_path / "a"), tmp_path / "again")
    assert files(tmp_path / "again").keys() == files(root).keys()
    assert files(tmp_path / "again") != files(root)


def test_shards_of_other_photos_are_not_restored(root, tmp_path, tokenizer):
    read(root, tmp_path)
    raw, outputs = tmp_path / "raw-train-0.parquet", [tmp_path / f"{name}.parquet" for name in "rxa"]
    archive.run(AlignConfig(tokenizer, ""), "train", raw, root, lock_of(root), *outputs)
    with pytest.raises(DataError, match=r"a\.parquet is not about the photos of its raw shard"):
        archive.restore([tmp_path / "raw-validation-0.parquet"], outputs[2:], tmp_path / "out")
    with pytest.raises(DataError, match="2 raw and 1 archived shards"):
        archive.restore([raw, raw], outputs[2:], tmp_path / "out")
    with pytest.raises(DataError, match=r"holds an archive"):
        archive.restore([raw], outputs[2:], root)


def test_corners_between_pixels_hold_their_box(root):
    """Records have whole pixels; the box grows to them."""
    add(root, "0000001", segments=[SEGMENTS[0] | {"bbox": [0.5, 2, 7.25, 20.0]}])
    _, (segment,), _ = archive.read_annotation(root, "0000001", (24, 32))
    assert segment["bbox"] == [0, 2, 8, 20]


def test_records_to_files_to_records_is_exact(root, tmp_path):
    first = read(root, tmp_path / "a")
    archive.export(first, tmp_path / "again")
    (tmp_path / "photos.sha256").unlink()
    second = read(tmp_path / "again", tmp_path / "b")
    assert read_rows(first, RECORD) == read_rows(second, RECORD)
    row = read_rows(first, RECORD)[0]
    assert [s["score"] for s in row["segments"]] == [None] * 3  # the archive does not say
    assert row["segment_revision"].startswith("sha256:")


def test_other_photos_are_written_without_loss(tmp_path, annotated, tokenizer):
    """Our own records, which are PNG; and a photo that a camera turned, which their loader would not turn."""
    from moa.data import align

    paths = tmp_path / "records.parquet", tmp_path / "rejected.parquet", tmp_path / "phrases.parquet"
    align.run(
        AlignConfig(tokenizer, ""), "train", annotated.raw, annotated.captions, annotated.segments, *paths
    )
    rows = read_rows(paths[0], RECORD)
    side = rows[0]["width"]
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))
    rows[0]["image"] = {"bytes": encoded(photo, "JPEG", exif=turned()), "path": None}
    write_rows(paths[0], rows, RECORD)
    archive.export([paths[0]], tmp_path / "out")
    for row in rows:
        stored = Image.open(
            tmp_path / "out" / listing.archive_file(row["id"], ".jpg")
        )  # as their loader sees it
        assert np.array_equal(np.asarray(stored), np.asarray(decode_image(row["image"])))
        caption, segments, ids = archive.read_annotation(tmp_path / "out", row["id"], stored.size[::-1])
        assert caption == row["caption"]
        assert [s | {"score": None} for s in row["segments"]] == segments
        assert np.array_equal(ids, decode_mask(row["mask"]))


def test_the_archive_s_lists_decide_who_is_held_out(root, tmp_path):
    _, aside = ingest(config(root, "fastcomposer", ids="name"), tmp_path, ONE)
    assert not aside
    assert [r["id"] for r in read_rows(tmp_path / "raw-validation-0.parquet", RAW)] == ["0100003"]
    assert len(read_rows(tmp_path / "raw-train-0.parquet", RAW)) == 3


def test_an_id_for_training_and_testing_is_an_error(root, tmp_path):
    (root / "image_ids_test.txt").write_text("0100003\n0000001\n")
    with pytest.raises(DataError, match=r"0000001 is in .*train"):
        lock.run(config(root, "fastcomposer"), tmp_path / "index.parquet")


def test_an_id_in_any_list_is_listed(root, tmp_path):
    (root / "image_ids.txt").write_text("0000000\n0000001\n")
    kept, aside = ingest(config(root, "fastcomposer"), tmp_path, ONE)
    assert len(kept) == 4 and not aside


def test_a_list_in_another_encoding_is_named(root, tmp_path):
    (root / "image_ids_train.txt").write_bytes(b"latin-\xe9\n")
    with pytest.raises(DataError, match=r"image_ids_train\.txt is no text in UTF-8"):
        lock.run(config(root, "fastcomposer"), tmp_path / "index.parquet")


def claim(shape: tuple[int, ...]) -> bytes:
    """A .npy that claims such a shape and holds one number."""
    file = io.BytesIO()
    header = {"descr": "<i4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + bytes(4)


def spoil(root: Path, how: str) -> None:
    about, mask = root / "00000/0000001.json", root / "00000/0000001.npy"
    if how == "missing":
        mask.unlink()
    elif how == "unlisted":
        (root / "image_ids_train.txt").write_text("0000000\n0000002\n")
    elif how == "name":
        for listed in ("image_ids.txt", "image_ids_train.txt"):
            (root / listed).write_text("0000000\n../../secret\n0000002\n")
    elif how == "no json":
        about.write_text("{")
    elif how == "offsets":
        add(root, "0000001", segments=[SEGMENTS[0] | {"end": 900}])
    elif how == "corners":
        add(root, "0000001", segments=[SEGMENTS[0] | {"bbox": [0, 0, 3]}])
    elif how == "no number":
        add(root, "0000001", segments=[SEGMENTS[0] | {"bbox": [0, float("nan"), 3, 4]}])
    elif how in ("caption", "word", "coco_label"):
        changes = {"caption": list(CAPTION)} if how == "caption" else {"segments": [SEGMENTS[0] | {how: 3}]}
        add(root, "0000001", **changes)
    elif how == "surrogate":
        add(root, "0000001", segments=[SEGMENTS[0] | {"word": "\ud800"}])
    elif how == "large id":
        add(root, "0000001", segments=[SEGMENTS[0] | {"id": 2**70}])
    elif how == "deep":
        about.write_text("[" * 100_000)
    elif how == "npz":
        with mask.open("wb") as file:
            np.savez(file, np.zeros((24, 32), np.int32))
    elif how == "huge":
        mask.write_bytes(claim((10**7, 10**7)))
    elif how == "cut":
        mask.write_bytes(claim((24, 32)))
    elif how == "pickle":
        np.save(mask, np.array([{}], object), allow_pickle=True)
    else:
        np.save(mask, np.zeros((5, 5), np.int32))


@pytest.mark.parametrize(
    ("how", "reason"),
    [(h, h) for h in ("missing", "unlisted", "name")]
    + [(h, "annotation") for h in ("no json", "offsets", "corners", "no number", "pickle", "size")]
    + [(h, "annotation") for h in ("caption", "word", "coco_label", "surrogate", "large id", "deep")]
    + [(h, "annotation") for h in ("npz", "huge", "cut")],
)
def test_what_does_not_fit_is_put_aside(how, reason, root, tmp_path):
    spoil(root, how)
    kept, aside = ingest(config(root, "fastcomposer"), tmp_path, ONE)
    assert len(kept) == 3
    assert [row["reason"] for row in aside.values()] == [reason]


def test_training_sees_persons_alone(root, tmp_path, tokenizer):
    """Two people and a tie: the tie leaves segments and mask; ties alone and shared words are rejected."""
    add(root, "0000000", segments=SEGMENTS[::-1])
    add(root, "0000001", segments=[SEGMENTS[0], SEGMENTS[0] | {"id": 2}])
    add(root, "0000002", segments=[SEGMENTS[2]])
    ingest(config(root, "fastcomposer"), tmp_path, ONE)
    out = [tmp_path / f"{name}.parquet" for name in ("records", "rejected", "archived")]
    archive.run(
        AlignConfig(tokenizer, ""), "train", tmp_path / "raw-train-0.parquet", root, lock_of(root), *out
    )
    (row,) = read_rows(out[0], RECORD)
    assert [(s["word"], s["segment_id"]) for s in row["segments"]] == [("man", 1), ("woman", 2)]
    assert set(np.unique(decode_mask(row["mask"]))) == {0, 1, 2}
    refused = {r["id"]: r["reason"] for r in read_rows(out[1], REJECTED)}
    assert refused == {"0000001": "plural", "0000002": "no_segment"}
    few = AlignConfig(tokenizer, "", max_subjects=1, max_rejected=1.0)
    archive.run(few, "train", tmp_path / "raw-train-0.parquet", root, lock_of(root), *out)
    assert read_rows(out[1], REJECTED)[0]["reason"] == "too_many"


def test_no_damage_to_a_mask_stops_the_run(root):
    """Flipped bytes of a header are a mask or a DataError: whatever NumPy raises, nothing else comes out."""
    mask, rng, outcomes = root / "00000/0000001.npy", np.random.default_rng(3), set()
    good = mask.read_bytes()
    for _ in range(300):
        data = bytearray(good)
        for place in rng.integers(0, 128, 3):
            data[place] = rng.integers(256)
        mask.write_bytes(data)
        try:
            _, _, ids = archive.read_annotation(root, "0000001", (24, 32))
            outcomes.add(ids.shape)
        except DataError:
            outcomes.add("error")
    assert outcomes <= {(24, 32), "error"} and "error" in outcomes


@pytest.mark.parametrize("ending", ["json", "npy"])
def test_an_annotation_that_changed_since_it_was_locked_is_an_error(ending, root, tmp_path, tokenizer):
    """It fits the photo as the locked one did, and only its hash tells."""
    ingest(config(root, "fastcomposer"), tmp_path, ONE)
    file = root / f"00000/0000001.{ending}"
    if ending == "json":
        file.write_text(file.read_text().replace("young woman", "short woman"))
    else:
        np.save(file, np.load(file)[::-1])
    out = [tmp_path / f"{name}.parquet" for name in ("records", "rejected", "archived")]
    with pytest.raises(DataError, match=rf"0000001\.{ending} is not the file of the archive's lock"):
        archive.run(
            AlignConfig(tokenizer, ""), "train", tmp_path / "raw-train-0.parquet", root, lock_of(root), *out
        )
    assert not any(path.exists() for path in out)


def test_a_shard_of_which_nothing_is_left_is_an_error(root, tmp_path, tokenizer):
    """Like a shard that was annotated here; what was rejected can be looked at."""
    for photo in ("0000000", "0000001", "0000002"):
        add(root, photo, segments=[SEGMENTS[2]])
    ingest(config(root, "fastcomposer"), tmp_path, ONE)
    out = [tmp_path / f"{name}.parquet" for name in ("records", "rejected", "archived")]
    with pytest.raises(DataError, match=r"3 of 3 photos were rejected \{'no_segment': 3\}, more than max_r"):
        archive.run(
            AlignConfig(tokenizer, ""), "train", tmp_path / "raw-train-0.parquet", root, lock_of(root), *out
        )
    assert len(read_rows(out[1], REJECTED)) == 3 and not out[0].exists()


def test_an_archive_is_not_written_into_another(root, tmp_path):
    records, before = read(root, tmp_path / "a"), files(root)
    with pytest.raises(DataError, match=r"holds an archive.*name another folder"):
        archive.export(records[:1], root)
    assert files(root) == before


def test_an_empty_id_cannot_be_exported(root, tmp_path):
    """It would name a file of the machine's root."""
    row = read_rows(read(root, tmp_path / "a")[0], RECORD)[0] | {"id": ""}
    write_rows(tmp_path / "r.parquet", [row], RECORD)
    with pytest.raises(DataError, match="'' cannot be a file's name"):
        archive.export([tmp_path / "r.parquet"], tmp_path / "out")


def test_an_id_with_folders_cannot_be_exported(root, tmp_path):
    row = read_rows(read(root, tmp_path / "a")[0], RECORD)[0] | {"id": "00000/00000"}
    write_rows(tmp_path / "r.parquet", [row], RECORD)
    with pytest.raises(DataError, match=r"set data\.photos\.ids to name"):
        archive.export([tmp_path / "r.parquet"], tmp_path / "out")
