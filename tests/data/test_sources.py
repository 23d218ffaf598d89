"""Whatever lies in a user's folder: photos come through byte for byte, the rest is put aside, and why."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moa.data.errors import REASONS, DataError
from moa.data.records import RAW, decode_image, read_rows, sha256
from moa.data.sources import listing, lock, photos, quarantine
from moa.data.sources.config import PhotosConfig, QuarantineConfig
from moa.data.sources.listing import shard_of, split_of, stamp
from moa.data.sources.quarantine import Quarantined, examine
from moa.data.sources.reasons import QUARANTINED
from tests.data.files import (
    BAD,
    FRAMES,
    GOOD,
    GREY,
    PIXELS,
    SHARDS,
    config,
    encoded,
    ingest,
    shards_of,
    turned,
    write_tar,
)


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
    write_tar(open_folder / "0.tar", {"a.png": encoded(), "b.png": encoded(FRAMES[1])})
    (open_folder / "0.tar").chmod(0)
    before, said = seen_by_a_user(config(open_folder, "tar"))
    assert "cannot be opened (0.tar may not be read); mend its name or rights" in said
    (open_folder / "0.tar").chmod(0o644)
    after, reasons = seen_by_a_user(config(open_folder, "tar"))
    assert reasons == [""] * 2 and after != before


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
