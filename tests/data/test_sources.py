"""Whatever lies in a user's folder: photos come through byte for byte, the rest is put aside, and why."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moa.data.errors import REASONS, DataError
from moa.data.records import RAW, REJECTED, decode_image, read_rows, sha256
from moa.data.sources import hub, listing, lock, photos, quarantine
from moa.data.sources.config import PhotosConfig, QuarantineConfig
from moa.data.sources.listing import shard_of, split_of, stamp
from moa.data.sources.quarantine import Quarantined, examine
from moa.data.sources.reasons import QUARANTINED
from tests.data import hub_cache

SHARDS = {"train": 3, "validation": 1}
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(picture: Image.Image = PICTURE, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def header(width: int, height: int) -> bytes:
    """A PNG that claims to be so large and holds no pixel."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    claim = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", claim)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def grey_tiff(values: np.ndarray) -> bytes:
    """An uncompressed TIFF of grey values of any kind."""
    height, width = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags |= {279: values.nbytes, 339: kind}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = struct.pack("<I", 8 + values.nbytes)
    return b"II*\0" + start + values.tobytes() + struct.pack("<H", len(tags)) + fields + bytes(4)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


FRAMES = [Image.fromarray(np.roll(PIXELS, i, 0)) for i in range(3)]
GREY = PIXELS[..., 0]
DEEP = Image.fromarray(GREY.astype(np.uint16) * 257)
GOOD = {
    "plain.png": encoded(),
    "photo.jpg": encoded(kind="JPEG"),
    "deep.png": encoded(DEEP),
    "print.jpg": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "grey.jpg": encoded(PICTURE.convert("L"), "JPEG"),
    "turned.jpg": encoded(kind="JPEG", exif=turned()),
    "palette.gif": encoded(PICTURE.convert("P"), "GIF"),
    "glass.png": encoded(PICTURE.convert("RGBA")),
    "haze.png": encoded(Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (32, 24), 51)])),
    "bits.png": encoded(Image.fromarray(GREY > 127)),
    "light.tif": grey_tiff((GREY / 255).astype("<f4")),
    "scan.tif": grey_tiff(GREY.astype("<u2") * 257),
    "mislabelled.png": encoded(kind="JPEG"),
    "new.webp": encoded(kind="WEBP"),
    "camera.mpo": encoded(kind="MPO", save_all=True, append_images=FRAMES[:1]),
}
BAD = {
    "page.jpg": (b"<html>404</html>", "no_image"),
    "empty.jpg": (b"", "no_image"),
    "cut.png": (encoded()[:-500], "broken"),
    "cut.jpg": (encoded(kind="JPEG")[:300], "broken"),
    "levels.tif": (grey_tiff(GREY.astype("<f4")), "grey"),
    "dark.tif": (grey_tiff((GREY / 255 - 0.5).astype("<f4")), "grey"),
    "hole.tif": (grey_tiff(np.where(GREY > 9, GREY / 255, np.nan).astype("<f4")), "grey"),
    "whole.tif": (grey_tiff(GREY.astype("<i4")), "grey"),
    "long.tif": (grey_tiff(GREY.astype("<u4") * 2**24), "grey"),
    "signed.tif": (grey_tiff(GREY.astype("<i2")), "grey"),
    "double.tif": (grey_tiff(GREY / 255), "no_image"),
    "moving.gif": (encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "animated"),
    "moving.webp": (encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "animated"),
    "moving.png": (encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "animated"),
    "pages.tif": (encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), "animated"),
    "dot.png": (encoded(Image.new("RGB", (1, 1))), "small_photo"),
    "poster.png": (header(12_000, 9_000), "large_photo"),
    "bomb.png": (header(60_000, 60_000), "large_photo"),
    "heavy.jpg": (encoded(kind="JPEG") + b"\0" * 50_000, "large_photo"),
}


def config(folder: Path, source: str = "folder", **changes) -> PhotosConfig:
    return PhotosConfig(
        source=source, path=str(folder), name="test", lock=folder.parent / "photos.sha256", held_out=0.3,
        max_bytes=40_000, **changes,
    )  # fmt: skip


def ingest(settings: PhotosConfig, out: Path, shards: dict[str, int] = SHARDS) -> tuple[dict, dict]:
    """All raw rows and all quarantined rows of a source, by id, through the stages."""
    lock.run(settings, out / "index.parquet")
    return shards_of(settings, out, shards)


def shards_of(settings: PhotosConfig, out: Path, shards: dict[str, int] = SHARDS) -> tuple[dict, dict]:
    """All raw rows and all quarantined rows of an index, by id."""
    kept, aside = [], []
    for split, count in shards.items():
        for shard in range(count):
            names = out / f"raw-{split}-{shard}.parquet", out / f"bad-{split}-{shard}.parquet"
            photos.run(settings, split, shard, count, out / "index.parquet", *names)
            kept += read_rows(names[0], RAW)
            aside += read_rows(names[1], REJECTED)
    assert len({row["id"] for row in kept}) == len(kept)
    return {row["id"]: row for row in kept}, {row["id"]: row for row in aside}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Every kind of file, some below folders, and links."""
    top = tmp_path / "photos"
    (top / "below/deeper").mkdir(parents=True)
    for number, (name, data) in enumerate({**GOOD, **{k: v[0] for k, v in BAD.items()}}.items()):
        (top / ("below/deeper", "below", "")[number % 3] / name).write_bytes(data)
    (tmp_path / "secret.png").write_bytes(encoded())
    (top / "out.png").symlink_to(tmp_path / "secret.png")
    (top / "foreign.png").symlink_to(os.fsdecode(b"/latin-\xe9"))  # a target that no table can hold
    (top / "nowhere.png").symlink_to(tmp_path / "none.png")
    (top / "round.png").symlink_to(top / "round.png")
    (top / "loop").symlink_to(top)
    (top / "gone.txt").symlink_to(tmp_path / "none.txt")
    (top / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    os.mkfifo(top / "pipe.png")  # reading it would wait for ever
    (top / "notes.txt").write_text("no photo")
    (top / "._photo.jpg").write_bytes(b"resource fork")
    return top


def by_name(rows: dict) -> dict:
    return {Path(name).name: row for name, row in rows.items()}


def test_every_odd_file_is_handled_or_put_aside(folder, tmp_path):
    kept, aside = (by_name(rows) for rows in ingest(config(folder), tmp_path / "out"))
    assert set(kept) == {Path(name).stem for name in GOOD}
    for name, data in GOOD.items():
        row = kept[Path(name).stem]
        assert (row["image"]["bytes"], row["sha256"], row["source"]) == (data, sha256(data), "test")
        assert decode_image(row["image"]).size == (row["width"], row["height"])
    assert {name for name, row in aside.items() if row["reason"] == "link"} == {
        "out",
        "nowhere",
        "round",
        "foreign",
    }
    assert aside["foreign"]["detail"].endswith(r"foreign.png → /latin-\udce9")
    assert aside["pipe"]["reason"] == "unreadable"
    assert (
        aside["phone"]["reason"] == "format"
        and "phone.HEIC: .HEIC is not decoded" in aside["phone"]["detail"]
    )


@pytest.mark.parametrize("name", BAD)
def test_the_reason_fits(name, tmp_path):
    data, reason = BAD[name]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / name).write_bytes(data)
    kept, aside = ingest(config(tmp_path / "photos"), tmp_path / "out")
    assert not kept
    assert [row["reason"] for row in aside.values()] == [reason]
    assert next(iter(aside.values()))["detail"]


def test_odd_modes_show_the_right_picture():
    """16 bits are scaled, not clipped; a print is no negative; a turned photo is upright, and its size."""

    def pixels(name):
        return np.asarray(decode_image({"bytes": GOOD[name]})).astype(int)

    for name in ("deep.png", "scan.tif", "light.tif"):
        assert np.array_equal(pixels(name), np.stack([GREY] * 3, -1)), name
    assert np.array_equal(pixels("bits.png")[..., 0], np.where(GREY > 127, 255, 0))
    assert np.abs(pixels("haze.png")[..., 0] - (0.2 * GREY + 0.8 * 255)).max() <= 1
    smooth = Image.fromarray(np.linspace(0, 255, 24 * 32).reshape(24, 32).astype(np.uint8)).convert("RGB")
    printed = decode_image({"bytes": encoded(smooth.convert("CMYK"), "JPEG", quality=95)})
    assert np.abs(np.asarray(printed).astype(int) - np.asarray(smooth)).mean() < 8
    assert examine(GOOD["turned.jpg"], config(Path("x"))) == (24, 32)
    assert np.array_equal(pixels("turned.jpg"), np.rot90(pixels("photo.jpg"), -1))


def test_a_jpeg_damaged_inside_passes_as_the_page_says():
    """Pillow does not tell; should it one day, docs/data.md must say so."""
    data = bytearray(encoded(Image.fromarray(np.kron(PIXELS, np.ones((8, 8, 1), np.uint8))), "JPEG"))
    middle = len(data) // 2
    data[middle : middle + 500] = bytes(500)
    assert examine(bytes(data), config(Path("x"))) == (256, 192)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("levels.tif", r"^grey: .*values from 0 to 255; 0 to 1 is wanted$"),
        ("hole.tif", r"^grey: .*NaN or infinite pixels$"),
        ("whole.tif", r"^grey: signed or 32-bit whole numbers; save it with 8 or 16 unsigned bits$"),
        ("double.tif", r"^no_image: none of JPEG, .*TIFF.* as Pillow reads them; the file begins with b'II"),
    ],
)
def test_a_picture_without_a_white_is_not_called_broken(name, said):
    with pytest.raises(Quarantined, match=said):
        examine(BAD[name][0], config(Path("x")))


def test_a_bomb_costs_no_memory(monkeypatch):
    """The header decides; no pixel may be decoded first."""
    monkeypatch.setattr(quarantine, "decode_image", lambda value: pytest.fail("decoded"))
    for name in ("poster.png", "bomb.png", "dot.png"):
        with pytest.raises(Quarantined):
            examine(BAD[name][0], config(Path("x")))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged tags
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_no_damage_stops_the_run(kind):
    """Flipped and cut bytes are a photo or are put aside: whatever Pillow raises, nothing else comes out."""
    good, rng, outcomes = (
        encoded(kind=kind, **({"exif": turned()} if kind == "JPEG" else {})),
        np.random.default_rng(1),
        set(),
    )
    for _ in range(150):
        data = bytearray(good[: rng.integers(8, len(good) + 1)])
        for place in rng.integers(0, len(data), 4):
            data[place] = rng.integers(256)
        try:
            width, height = examine(bytes(data), config(Path("x")))
            assert decode_image({"bytes": bytes(data)}).size == (width, height)
            outcomes.add("kept")
        except Quarantined as why:
            outcomes.add(why.reason)
    assert outcomes <= {"kept", *QUARANTINED}
    assert len(outcomes) > 1


def test_reasons_are_told_apart():
    assert not set(QUARANTINED) & set(REASONS)


# --- Splits and shards ------------------------------------------------------------------------------------


def test_a_thousand_of_seventy_thousand_are_held_out():
    ids = [f"{i:05d}" for i in range(70_000)]
    held = {name for name in ids if split_of(name, 1 / 70) == "validation"}
    assert 900 < len(held) < 1100
    assert held < {name for name in ids if split_of(name, 1 / 35) == "validation"}
    sizes = np.bincount([shard_of(name, 140) for name in ids if name not in held], minlength=140)
    assert len(sizes) == 140 and sizes.min() > 400 and sizes.max() < 600
    assert (
        shard_of("00000", 140) == 19 and split_of("00011", 0.3) == "validation"
    )  # for ever: published splits


def test_split_and_shard_depend_on_nothing_but_the_id(folder, tmp_path):
    """Half of the photos, copied in another order: each is where it was before."""
    whole, _ = ingest(config(folder), tmp_path / "whole")
    half = tmp_path / "again" / "photos"
    for name in sorted(whole, reverse=True)[::2]:
        source = next(folder.glob(f"{name}.*"))
        (half / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, half / source.relative_to(folder))
    part, _ = ingest(config(half), tmp_path / "part")
    assert set(part) == set(sorted(whole, reverse=True)[::2])

    def place(out):
        files = sorted(out.glob("raw-*.parquet"))
        return {row["id"]: file.name for file in files for row in read_rows(file, RAW)}

    places = place(tmp_path / "whole")
    assert place(tmp_path / "part") == {name: places[name] for name in part}
    assert len(set(places.values())) == 4


def test_one_changed_file_touches_one_shard(folder, tmp_path):
    settings = config(folder)
    before = {(s, n): stamp(settings, SHARDS, s, n) for s, count in SHARDS.items() for n in range(count)}
    all_before = stamp(settings, SHARDS)
    changed = next(folder.rglob("plain.png"))
    changed.write_bytes(encoded(FRAMES[1]))
    listing._stamps.cache_clear()
    after = {(s, n): stamp(settings, SHARDS, s, n) for s, n in before}
    name = changed.relative_to(folder).with_suffix("").as_posix()
    split = split_of(name, 0.3)
    assert [key for key in before if before[key] != after[key]] == [(split, shard_of(name, SHARDS[split]))]
    assert stamp(settings, SHARDS) != all_before
    assert stamp(config(tmp_path / "none"), SHARDS) == "absent"


def test_a_lost_shard_comes_back_the_same(folder, tmp_path):
    ingest(config(folder), tmp_path)
    shard = max(tmp_path.glob("raw-*.parquet"), key=lambda path: path.stat().st_size)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")}
    shard.unlink()
    _, split, number = shard.stem.split("-")
    files = tmp_path / shard.name, tmp_path / shard.name.replace("raw", "bad")
    photos.run(config(folder), split, int(number), SHARDS[split], tmp_path / "index.parquet", *files)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")} == before


@pytest.mark.parametrize("shard", [-1, 3])
def test_a_shard_that_there_is_not_is_an_error(shard, folder, tmp_path):
    lock.run(config(folder), tmp_path / "index.parquet")
    files = tmp_path / "raw.parquet", tmp_path / "bad.parquet"
    with pytest.raises(DataError, match=rf"train has shards 0\.\.2, not {shard}; correct shards\.train"):
        photos.run(config(folder), "train", shard, 3, tmp_path / "index.parquet", *files)
    assert not any(file.exists() for file in files)


def test_two_files_with_one_id_leave_one(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "a.jpg", "b.png"):
        (tmp_path / "photos" / name).write_bytes(GOOD["plain.png" if "png" in name else "photo.jpg"])
    kept, aside = ingest(config(tmp_path / "photos"), tmp_path)
    assert sorted(kept) == ["a", "b"] and kept["a"]["image"]["path"] == "a.jpg"
    assert aside["a"]["reason"] == "same_id" and "a.png has the id of a.jpg" in aside["a"]["detail"]


def test_a_held_out_photo_is_not_trained_on_under_another_id(tmp_path):
    """With equal bytes in both splits a training sees what it is judged by; in one split they do no harm."""
    top = tmp_path / "photos"
    top.mkdir()
    train = [name for name in "abcdefghijkl" if split_of(name, 0.3) == "train"]
    held = [name for name in "abcdefghijkl" if split_of(name, 0.3) == "validation"]
    for name in (train[0], train[1], held[0]):
        (top / f"{name}.png").write_bytes(GOOD["plain.png"])
    for name in (train[2], train[3]):
        (top / f"{name}.png").write_bytes(GOOD["deep.png"])
    for name in (train[4], held[1]):
        (top / f"{name}.jpg").write_bytes(BAD["page.jpg"][0])
    kept, aside = ingest(config(top), tmp_path)
    assert set(kept) == {held[0], train[2], train[3]}
    assert {name: row["reason"] for name, row in aside.items()} == {
        train[0]: "both_splits", train[1]: "both_splits", train[4]: "no_image", held[1]: "no_image",
    }  # fmt: skip
    said = f"{train[0]}.png has the bytes of {held[0]}.png, which is held out"
    assert aside[train[0]]["detail"] == said


def test_a_shard_older_than_a_held_out_copy_of_its_photo_is_an_error(tmp_path):
    """A changed file redoes its own shard alone, and the copy that leaks lies in another."""
    top = tmp_path / "photos"
    top.mkdir()
    held = next(name for name in "abcdefghijkl" if split_of(name, 0.3) == "validation")
    train = next(name for name in "abcdefghijkl" if split_of(name, 0.3) == "train")
    (top / f"{train}.png").write_bytes(GOOD["plain.png"])
    (top / f"{held}.png").write_bytes(GOOD["deep.png"])

    def check() -> None:
        shards = sorted(tmp_path.glob("bad-*.parquet"))
        quarantine.run(QuarantineConfig(1.0), tmp_path / "index.parquet", shards, tmp_path / "q.csv")

    ingest(config(top), tmp_path)
    check()
    for data in (GOOD["plain.png"], GOOD["deep.png"]):
        (top / f"{held}.png").write_bytes(data)
        lock.run(config(top), tmp_path / "index.parquet", accept=True)
        with pytest.raises(
            DataError, match=rf"^1 photos \({train}\.png\) have become, or no longer are, .*touch"
        ):
            check()
        shards_of(config(top), tmp_path)
        check()


@pytest.mark.parametrize("kept", ["jpg", "png"])
def test_a_held_out_copy_is_seen_beside_a_file_of_its_id_that_was_put_aside(kept, tmp_path):
    """The kept one leaks, whether the other's id came second or its link leads nowhere."""
    top = tmp_path / "photos"
    top.mkdir()
    held = next(name for name in "abcdefghijkl" if split_of(name, 0.3) == "validation")
    train = next(name for name in "abcdefghijkl" if split_of(name, 0.3) == "train")
    (top / f"{train}.{kept}").write_bytes(GOOD["plain.png"])
    if kept == "jpg":
        (top / f"{train}.png").write_bytes(GOOD["turned.jpg"])
    else:
        (top / f"{train}.jpg").symlink_to(tmp_path / "away.jpg")
    (top / f"{held}.png").write_bytes(GOOD["deep.png"])
    ingest(config(top), tmp_path)
    (top / f"{held}.png").write_bytes(GOOD["plain.png"])
    lock.run(config(top), tmp_path / "index.parquet", accept=True)

    def check() -> None:
        shards = sorted(tmp_path.glob("bad-*.parquet"))
        quarantine.run(QuarantineConfig(1.0), tmp_path / "index.parquet", shards, tmp_path / "q.csv")

    with pytest.raises(DataError, match=rf"^1 photos \({train}\.{kept}\) have become"):
        check()
    shards_of(config(top), tmp_path)
    check()


def test_a_name_that_is_put_aside_takes_no_id(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").symlink_to(tmp_path / "away.jpg")
    (tmp_path / "photos/a.png").write_bytes(encoded())
    kept, aside = ingest(config(tmp_path / "photos"), tmp_path)
    assert kept["a"]["image"]["path"] == "a.png"
    assert aside["a"]["reason"] == "link"


@pytest.mark.parametrize(
    ("link", "target"), [("away", "others"), ("away.jpg", "others"), ("store", ".store"), ("disk", "none")]
)
def test_a_link_to_a_folder_that_is_not_looked_at_is_an_error(link, target, tmp_path):
    """Many photos may lie there; as one photo put aside they would pass any limit."""
    photos = tmp_path / "photos"
    for place in (photos, photos / ".store", tmp_path / "others"):
        place.mkdir()
        (place / "a.png").write_bytes(encoded())
    (photos / link).symlink_to((photos if target == ".store" else tmp_path) / target)
    message = (
        rf"photos/{link} is a link to .*{target}, .* could not be counted: give that folder as data\.photos"
    )
    with pytest.raises(DataError, match=message):
        lock.run(config(photos), tmp_path / "index.parquet")
    assert not config(photos).lock.exists()
    (photos / link).unlink()
    assert set(ingest(config(photos), tmp_path)[0]) == {"a"}


def test_a_raw_photo_is_not_taken_for_its_preview(tmp_path):
    """Cameras' files are TIFF by their first bytes; the JPEG beside one has its id and is kept."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.NEF").write_bytes(encoded(kind="TIFF"))
    (tmp_path / "photos/a.jpg").write_bytes(GOOD["photo.jpg"])
    kept, aside = ingest(config(tmp_path / "photos"), tmp_path)
    assert kept["a"]["image"]["path"] == "a.jpg"
    assert aside["a"]["reason"] == "format" and "a.NEF" in aside["a"]["detail"]


def test_names_that_no_table_can_hold_are_put_aside(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in (b"line\nbreak.png", b"latin-\xe9.png", "schön 好.png".encode()):
        (tmp_path / "photos" / os.fsdecode(name)).write_bytes(encoded())
    kept, aside = ingest(config(tmp_path / "photos"), tmp_path)
    assert list(kept) == ["schön 好"]
    assert [row["reason"] for row in aside.values()] == ["name", "name"]


# --- The lock ---------------------------------------------------------------------------------------------


def test_the_lock_is_what_sha256sum_says(folder, tmp_path):
    settings = config(folder)
    lock.run(settings, tmp_path / "index.parquet")
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", settings.lock], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": OK") == len(GOOD) + len(BAD)


@pytest.mark.parametrize("what", ["changed", "missing", "new"])
def test_a_source_that_is_not_what_it_was_is_named_with_the_cure(what, folder, tmp_path):
    settings = config(folder)
    lock.run(settings, tmp_path / "index.parquet")
    before = settings.lock.read_bytes()
    lock.run(settings, tmp_path / "index.parquet")  # nothing has changed
    plain = next(folder.rglob("plain.png"))
    if what == "new":
        shutil.copy(plain, plain.with_name("fresh.png"))
    elif what == "missing":
        plain.unlink()
    else:
        stat = plain.stat()
        plain.write_bytes(plain.read_bytes()[:-1] + b"!")
        os.utime(plain, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # size and time tell nothing
    named = "fresh" if what == "new" else "plain"
    message = rf"1 {what} \(\S*{named}\.png\)\. Put the old files back.*--accept"
    with pytest.raises(DataError, match=message):
        lock.run(settings, tmp_path / "index.parquet")
    assert settings.lock.read_bytes() == before
    settings.lock.write_bytes(before + b"#my note\n")
    lock.run(settings, tmp_path / "index.parquet", accept=True)
    assert settings.lock.read_bytes() != before
    title = before.decode().splitlines()[0]
    comments = [line for line in settings.lock.read_text().splitlines() if line.startswith("#")]
    assert comments == [title, "#my note"]
    lock.run(settings, tmp_path / "index.parquet")


def test_a_photo_that_changes_between_lock_and_shard_is_named(folder, tmp_path):
    lock.run(config(folder), tmp_path / "index.parquet")
    next(folder.rglob("plain.png")).write_bytes(encoded(FRAMES[2]))
    with pytest.raises(DataError, match=r"plain\.png has changed since it was locked"):
        shards_of(config(folder), tmp_path)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def seen_by_a_user(settings: PhotosConfig) -> tuple[str, list[str] | str]:
    """Stamp and reasons, or an error, as anybody but root sees them, whom no right stops."""

    def look(sender) -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        listing._stamps.cache_clear()
        try:
            said = [found.reason for found in listing.photos(settings)]
        except DataError as error:
            said = str(error)
        sender.send((stamp(settings, SHARDS), said))

    receiver, sender = multiprocessing.Pipe(False)
    child = multiprocessing.get_context("fork").Process(target=look, args=[sender])
    child.start()
    child.join(30)
    assert child.exitcode == 0
    return receiver.recv()


def test_a_file_whose_rights_are_mended_is_taken_in(open_folder):
    photo = open_folder / "a.png"
    photo.write_bytes(encoded())
    photo.chmod(0)
    settings = config(open_folder)
    before, reasons = seen_by_a_user(settings)
    assert reasons == ["unreadable"]
    photo.chmod(0o644)
    after, reasons = seen_by_a_user(settings)
    assert reasons == [""] and after != before


def test_a_tar_that_may_not_be_read_is_an_error_until_its_rights_are_mended(open_folder):
    write_tar(open_folder / "0.tar", FOUR)
    (open_folder / "0.tar").chmod(0)
    before, said = seen_by_a_user(config(open_folder, "tar"))
    assert "cannot be opened (0.tar may not be read); mend its name or rights" in said
    (open_folder / "0.tar").chmod(0o644)
    after, reasons = seen_by_a_user(config(open_folder, "tar"))
    assert reasons == [""] * 4 and after != before


def test_a_lock_in_another_encoding_is_named(folder, tmp_path):
    settings = config(folder)
    settings.lock.write_bytes(b"# latin-\xe9\n")
    with pytest.raises(DataError, match=r"photos\.sha256 is no text in UTF-8"):
        lock.run(settings, tmp_path / "index.parquet")


def test_a_damaged_lock_is_named(folder, tmp_path):
    settings = config(folder)
    settings.lock.write_text("# test\n<<<<<<< HEAD\n")
    with pytest.raises(DataError, match=r"photos\.sha256, line 2 is no hash and name"):
        lock.run(settings, tmp_path / "index.parquet")


def test_a_missing_or_empty_source_names_the_key(tmp_path):
    with pytest.raises(DataError, match=r"data\.photos\.path: there is no folder"):
        lock.run(config(tmp_path / "none"), tmp_path / "index.parquet")
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"data\.photos\.path: no photo below"):
        lock.run(config(tmp_path / "photos"), tmp_path / "index.parquet")


# --- The limit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "passes"), [(0.5, False), (0.9, True), (24, False), (25, True), (0, False)]
)
def test_a_rotten_source_is_an_error_with_its_counts(limit, passes, folder, tmp_path):
    _, aside = ingest(config(folder), tmp_path)
    shards = sorted(tmp_path.glob("bad-*.parquet"))
    arguments = QuarantineConfig(limit), tmp_path / "index.parquet", shards, tmp_path / "q.csv"
    assert len(aside) == 25
    if passes:
        quarantine.run(*arguments)
        lines = (tmp_path / "q.csv").read_text().splitlines()
        assert lines[0] == "id,reason,detail" and len(lines) == 26
    else:
        with pytest.raises(
            DataError,
            match=r"25 of 40 photos .*'no_image': 3, 'format': 1, 'broken': 2, 'grey': 6, .*raise",
        ):
            quarantine.run(*arguments)
        assert not (tmp_path / "q.csv").exists()


def test_settings_out_of_range_are_refused():
    for wrong in ({"held_out": 1.0}, {"max_pixels": 10**9}, {"min_side": 0}, {"max_bytes": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(config(Path("x")), **wrong)
    for limit in (-1, 1.5):
        with pytest.raises(ValueError, match="max_quarantined"):
            QuarantineConfig(limit)


# --- Tars -------------------------------------------------------------------------------------------------


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    top = tmp_path / "tars"
    top.mkdir()
    write_tar(
        top / "0000.tar",
        {"a.jpg": GOOD["photo.jpg"], "a.json": b"{}", "a.seg.png": encoded(), "b.png": encoded()},
    )
    write_tar(
        top / "0001.tar",
        {"a.jpg": GOOD["turned.jpg"], "c.jpg": BAD["page.jpg"][0], "sub/d.webp": GOOD["new.webp"]},
    )
    with tarfile.open(top / "0001.tar", "a") as tar:
        link = tarfile.TarInfo("e.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return top


def test_tars_are_read_by_key(tars, tmp_path):
    kept, aside = ingest(config(tars, "tar"), tmp_path)
    assert sorted(kept) == ["0000/a", "0000/b", "0001/a", "0001/sub/d"]
    assert kept["0001/a"]["image"]["bytes"] == GOOD["turned.jpg"]
    assert {name: row["reason"] for name, row in aside.items()} == {"0001/c": "no_image", "0001/e": "link"}
    (tmp_path / "photos.sha256").unlink()
    kept, aside = ingest(config(tars, "tar", ids="name"), tmp_path)
    assert sorted(kept) == ["a", "b", "d"]
    assert aside["a"]["reason"] == "same_id"


def test_a_cut_or_packed_tar_is_an_error_since_nobody_knows_what_is_lost(tars, tmp_path):
    whole = (tars / "0000.tar").read_bytes()
    for data in (whole[:700], zlib.compress(whole)):
        (tars / "0000.tar").write_bytes(data)
        with pytest.raises(DataError, match=r"0000\.tar is cut short, compressed or no tar .*fetch it again"):
            lock.run(config(tars, "tar"), tmp_path / "index.parquet")


FOUR = {f"{name}.png": encoded(picture) for name, picture in zip("abcd", [PICTURE, *FRAMES], strict=True)}


def cut_between_members(data: bytes, third: int) -> bytes:
    return data[:third]


def cut_in_a_header(data: bytes, third: int) -> bytes:
    return data[: third + 200]


def flip_a_byte_of_a_header(data: bytes, third: int) -> bytes:
    return data[: third + 3] + bytes([data[third + 3] ^ 1]) + data[third + 4 :]


def lose_a_block(data: bytes, third: int) -> bytes:
    return data[:third] + bytes(512) + data[third + 512 :]


def join_another(data: bytes, third: int) -> bytes:
    return data + data


DAMAGES = [cut_between_members, cut_in_a_header, flip_a_byte_of_a_header, lose_a_block, join_another]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_tar_that_lost_members_is_an_error(damage, tmp_path):
    """At each of these `tarfile` stops after two members without a word, or before those of a second tar."""
    (tmp_path / "tars").mkdir()
    path = tmp_path / "tars/0.tar"
    write_tar(path, FOUR)
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    path.write_bytes(damage(path.read_bytes(), third))
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == (4 if damage is join_another else 2)
    with pytest.raises(DataError, match=r"0\.tar is cut short.*no member and no end at byte \d+"):
        lock.run(config(tmp_path / "tars", "tar"), tmp_path / "index.parquet")


def test_a_damaged_tar_is_whole_or_an_error(tmp_path):
    """Whatever is flipped or cut, no member is lost in silence."""
    (tmp_path / "tars").mkdir()
    path, rng, outcomes = tmp_path / "tars/0.tar", np.random.default_rng(2), set()
    write_tar(path, FOUR)
    whole = path.read_bytes()
    for place in rng.integers(0, len(whole), 150):
        flipped = whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]
        for data in (flipped, whole[:place]):
            path.write_bytes(data)
            try:
                assert len(listing.photos(config(tmp_path / "tars", "tar"))) == 4
                outcomes.add("whole")
            except DataError:
                outcomes.add("error")
    assert outcomes == {"whole", "error"}


def test_a_link_to_a_tar_elsewhere_is_an_error(tars, tmp_path):
    """Of one within the folder the members are read."""
    (tmp_path / "elsewhere").mkdir()
    (tars / "0001.tar").rename(tmp_path / "elsewhere/0001.tar")
    (tars / "0001.tar").symlink_to(tmp_path / "elsewhere/0001.tar")
    message = (
        r"0001\.tar is a link to .*, .* could not be counted: give that tar's folder as data\.photos\.path"
    )
    with pytest.raises(DataError, match=message):
        lock.run(config(tars, "tar"), tmp_path / "index.parquet")
    (tars / "0001.tar").unlink()
    (tars / "0001.tar").symlink_to(tars / "0000.tar")
    assert "0001/a" in ingest(config(tars, "tar"), tmp_path)[0]


def test_members_in_other_formats_are_counted(tars, tmp_path):
    write_tar(tars / "0002.tar", {"a.jxl": b"\xff\n", "a.json": b"{}", "b.jpg": GOOD["photo.jpg"]})
    kept, aside = ingest(config(tars, "tar"), tmp_path)
    assert "0002/b" in kept and "0002.tar/a.jxl" in aside["0002/a"]["detail"]
    assert aside["0002/a"]["reason"] == "format"


def test_of_members_with_one_name_the_last_counts(tars, tmp_path):
    """What `tar --append` and `--update` leave; unpacking would, too."""
    with tarfile.open(tars / "0000.tar", "a") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.size = len(GOOD["grey.jpg"])
        tar.addfile(member, io.BytesIO(GOOD["grey.jpg"]))
    for _ in range(2):  # the second time the lock is there
        kept, aside = ingest(config(tars, "tar"), tmp_path)
        assert kept["0000/a"]["image"]["bytes"] == GOOD["grey.jpg"]
        assert "0000/a" not in aside


def test_a_link_in_a_tar_may_lead_anywhere(tars, tmp_path):
    with tarfile.open(tars / "0001.tar", "a") as tar:
        link = tarfile.TarInfo("f.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, os.fsdecode(b"latin-\xe9")
        tar.addfile(link)
    _, aside = ingest(config(tars, "tar"), tmp_path)
    assert aside["0001/f"]["detail"] == r"0001.tar/f.jpg → latin-\udce9"


# --- Data sets --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rows = {"image": [{"bytes": GOOD[n], "path": n} for n in ("plain.png", "turned.jpg")], "key": ["x", "y"]}
    rows["image"] += [{"bytes": BAD["page.jpg"][0], "path": None}, None]
    rows["key"] += ["z", "none"]
    features = datasets.Features({"image": datasets.Image(decode=False), "key": datasets.Value("string")})
    data = datasets.Dataset.from_dict(rows, features=features)
    data.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_saved_data_set_gives_the_bytes_that_were_put_in(saved, tmp_path):
    kept, aside = ingest(config(saved, "dataset", id_column="key"), tmp_path)
    assert {name: row["image"]["bytes"] for name, row in kept.items()} == {
        "x": GOOD["plain.png"], "y": GOOD["turned.jpg"],
    }  # fmt: skip
    assert {name: row["reason"] for name, row in aside.items()} == {"z": "no_image", "none": "no_image"}


def test_the_split_of_a_saved_data_set_is_the_one_asked_for(saved, tmp_path):
    """A single one may say which it is; of several, `all` are joined."""
    data = datasets.load_from_disk(str(saved))

    def ids(folder: str, split: str) -> list[str]:
        return hub.load(config(tmp_path / folder, "dataset", dataset_split=split, id_column="key"), "")["key"]

    rows = data.cast_column("image", datasets.Image(decode=False))
    parts = {
        split: datasets.Dataset.from_dict(rows[start:end], features=data.features, split=split)
        for split, start, end in (("train", 0, 2), ("test", 2, 3))
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    assert list(ids("both", "all")) == ["x", "y", "z"] and list(ids("both", "test")) == ["z"]
    with pytest.raises(DataError, match=r"^data\.photos: .*split 'valid', cannot be loaded.*dataset_split"):
        ids("both", "valid")
    assert list(ids("saved", "test")) == list(data["key"])  # it does not say
    for split in ("test", "all"):
        assert list(ids("both/test", split)) == ["z"]
    with pytest.raises(DataError, match=r"^data\.photos: .*it is the split 'test'.*dataset_split"):
        ids("both/test", "train")


def test_without_an_id_column_photos_are_called_after_their_bytes(saved, tmp_path):
    kept, _ = ingest(config(saved, "dataset"), tmp_path)
    assert set(kept) == {sha256(GOOD[name])[:16] for name in ("plain.png", "turned.jpg")}


def test_a_folder_of_parquet_is_a_data_set_too(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    datasets.load_from_disk(str(saved)).to_parquet(str(tmp_path / "files/train.parquet"))
    kept, _ = ingest(config(tmp_path / "files", "dataset", id_column="key"), tmp_path)
    assert sorted(kept) == ["x", "y"]


def test_a_data_set_cannot_name_files_of_this_machine(tmp_path, monkeypatch):
    """Its own files and what was fetched to the cache are read, through whatever path; nothing else is."""
    folder, cache = tmp_path / "files", tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    places = [tmp_path / "secret.png", folder / "own.png", cache / "fetched.png", tmp_path / "none.png"]
    for place in places[:3]:
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(encoded(FRAMES[places.index(place)]))
    (folder / "link.png").symlink_to(places[0])
    paths = [str(place) for place in [*places, folder / "link.png", f"{folder}/../secret.png"]]
    features = datasets.Features({"image": datasets.Image(), "key": datasets.Value("string")})
    rows = {"image": [{"bytes": None, "path": path} for path in paths], "key": list("abcdef")}
    pq.write_table(pa.Table.from_pydict(rows, features.arrow_schema), folder / "train.parquet")
    settings = config(folder, "dataset", id_column="key")
    kept, aside = ingest(settings, tmp_path)
    assert sorted(kept) == ["b", "c"]
    assert sorted(row["reason"] for row in aside.values()) == ["link"] * 3 + ["no_image"]
    assert "secret" not in settings.lock.read_text()


def test_other_columns_are_not_looked_at(saved, tmp_path):
    data = datasets.load_from_disk(str(saved))
    previews = [{"bytes": b"no picture", "path": None}] * len(data)
    data.add_column("preview", previews, feature=datasets.Image()).save_to_disk(str(tmp_path / "more"))
    kept, _ = ingest(config(tmp_path / "more", "dataset", id_column="key"), tmp_path)
    assert set(kept) == {"x", "y"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image_column": "picture"},
            r"data\.photos\.image_column: there is no 'picture' among \['image', 'key'\]",
        ),
        ({"image_column": "key"}, r"data\.photos\.image_column: 'key' holds no images"),
        ({"id_column": "name"}, r"data\.photos\.id_column: there is no 'name'"),
    ],
)
def test_wrong_columns_name_the_key(change, message, saved, tmp_path):
    with pytest.raises(DataError, match=message):
        lock.run(config(saved, "dataset", **change), tmp_path / "index.parquet")


def test_a_hub_that_cannot_be_asked_gives_no_revision(tmp_path, monkeypatch):
    """No network: the error says what to do, and nothing is written that looks like a revision."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    settings = replace(config(tmp_path / "x", "dataset"), path="someone/faces")
    with pytest.raises(
        DataError, match=r"'someone/faces' is no folder, and the hub does not say.*go online once"
    ):
        lock.run(settings, tmp_path / "index.parquet")
    settings.lock.write_text("# revision: " + "0" * 40 + "\n")
    with pytest.raises(
        DataError, match=r"data\.photos\.revision is 1+, but .*photos\.sha256 was made from 0+"
    ):
        lock.run(replace(settings, revision="1" * 40), tmp_path / "index.parquet")


def test_another_revision_than_the_lock_s_is_named(tmp_path):
    """A tag that is changed in the settings must not be answered with the old tag's photos."""
    settings = replace(config(tmp_path / "x", "dataset"), path="someone/faces", revision="v1")
    lock.write_lock(settings, "0" * 40, {})
    commit, asked, _ = lock.read_lock(settings.lock)
    for same in ("v1", "0" * 40):
        assert hub.commit(replace(settings, revision=same), commit, asked) == "0" * 40
    for other in ("v2", None):
        with pytest.raises(
            DataError, match=rf"revision is {other or 'main'}, but .*made from 0+ \(v1\).*--accept"
        ):
            lock.run(replace(settings, revision=other), tmp_path / "index.parquet")


# --- Data sets of the hub -----------------------------------------------------------------------------------

OLD, NEW = "a" * 40, "b" * 40
FACES = "someone/faces"


def parquet(name: str) -> bytes:
    """A file of one photo, as `push_to_hub` writes it."""
    file = io.BytesIO()
    features = datasets.Features({"image": datasets.Image(), "key": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": [{"bytes": GOOD[name]}], "key": [name]}, features).to_parquet(file)
    return file.getvalue()


@pytest.fixture
def cached(tmp_path: Path, monkeypatch) -> PhotosConfig:
    """Two commits of a data set in the hub's cache, with different photos; the newer one was fetched last."""
    hub_cache.offline(tmp_path / ".cache", monkeypatch)
    for commit, name in ((OLD, "plain.png"), (NEW, "photo.jpg")):
        files = {"data/train-00000-of-00001.parquet": parquet(name), "README.md": b"# Faces"}
        hub_cache.add_commit(tmp_path / ".cache", FACES, commit, files)
    return replace(config(tmp_path / "x", "dataset", id_column="key"), path=FACES)


@pytest.mark.parametrize("order", [(OLD, NEW, OLD), (NEW, OLD, NEW)])
def test_each_commit_gives_its_own_photos_offline(order, cached, tmp_path):
    """Whatever was read before, and whatever the caches of `datasets` hold of it."""
    for number, commit in enumerate(order):
        settings = replace(cached, revision=commit, lock=tmp_path / f"{number}.sha256")
        (tmp_path / f"{number}").mkdir()
        kept, aside = ingest(settings, tmp_path / f"{number}")
        name = {OLD: "plain.png", NEW: "photo.jpg"}[commit]
        assert {key: row["image"]["bytes"] for key, row in kept.items()} == {name: GOOD[name]} and not aside
        assert kept[name]["source"] == f"test@{commit}"
        assert f"# revision: {commit}\n" in settings.lock.read_text()


@pytest.mark.parametrize("commit", ["c" * 40, "main"])
def test_a_commit_that_is_not_in_the_cache_is_an_error_offline(commit, cached, tmp_path):
    """Another one would do for `datasets`, and lie in the lock under this one's name."""
    datasets.load_dataset(str(hub_cache_of(cached, tmp_path, NEW)))
    own = (tmp_path / ".cache/datasets" / NEW).rename(tmp_path / ".cache/datasets/someone___faces")
    [arrow] = own.rglob("*.arrow")
    arrow.rename(arrow.with_name("faces-train.arrow"))  # as if it had been loaded by its name
    settings = replace(cached, revision=commit)
    with pytest.raises(DataError, match=rf"data\.photos: .*{commit}.*go online once"):
        lock.run(settings, tmp_path / "index.parquet")
    assert not settings.lock.exists() and not (tmp_path / "index.parquet").exists()


def hub_cache_of(settings: PhotosConfig, tmp_path: Path, commit: str) -> Path:
    """The folder of a commit."""
    return tmp_path / f".cache/hub/datasets--{settings.path.replace('/', '--')}/snapshots/{commit}"


@pytest.mark.parametrize("lost", ["a file", "the list"])
def test_half_a_commit_in_the_cache_is_an_error_offline(lost, cached, tmp_path):
    """A fetch that was broken off: fewer photos would be locked as if they were all."""
    folder = hub_cache_of(cached, tmp_path, OLD)
    (folder / "README.md" if lost == "a file" else folder.parents[1] / f"trees/{OLD}.json").unlink()
    settings = replace(cached, revision=OLD)
    with pytest.raises(DataError, match=rf"commit {OLD} of the data set .* as a whole .*go online once"):
        lock.run(settings, tmp_path / "index.parquet")
    assert not settings.lock.exists()


def test_image_files_of_a_commit_are_read_through_its_links(cached, tmp_path):
    """They lie among the blobs, without endings; a link to anywhere else is still put aside."""
    name, commit = "someone/files", "d" * 40
    files = {f"train/{photo}": GOOD[photo] for photo in ("plain.png", "photo.jpg")}
    folder = hub_cache.add_commit(tmp_path / ".cache", name, commit, files)
    (tmp_path / "secret.png").write_bytes(encoded(FRAMES[1]))
    (folder / "train/secret.png").symlink_to(tmp_path / "secret.png")
    kept, aside = ingest(replace(cached, path=name, revision=commit, id_column=None), tmp_path)
    assert sorted(row["image"]["bytes"] for row in kept.values()) == sorted(files.values())
    assert [row["reason"] for row in aside.values()] == ["link"]


def test_a_loading_script_is_named(cached, tmp_path):
    files = {"faces.py": b"import datasets", "data/train.parquet": parquet("plain.png")}
    hub_cache.add_commit(tmp_path / ".cache", FACES, "e" * 40, files)
    with pytest.raises(DataError, match=r"data\.photos: 'someone/faces' has a loading script, faces\.py"):
        lock.run(replace(cached, revision="e" * 40), tmp_path / "index.parquet")


def test_a_lock_without_a_commit_is_named(cached, tmp_path):
    """A branch's name would be read at whatever it is now."""
    cached.lock.write_text("# revision: main\n# asked: main\n")
    with pytest.raises(DataError, match=r"'main' is no commit of .*photos\.sha256 from your backup"):
        lock.run(cached, tmp_path / "index.parquet")


def test_a_folder_that_is_gone_is_not_looked_for_on_the_hub(cached):
    with pytest.raises(DataError, match=r"data\.photos\.path: there is no folder someone/faces"):
        hub.load(cached, "")
