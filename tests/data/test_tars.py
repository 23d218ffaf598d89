"""Tars of photos: what is in them comes through byte for byte, and what is lost is an error."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from moa.data.errors import DataError
from moa.data.sources import listing, lock
from tests.data.files import (
    BAD,
    FRAMES,
    GOOD,
    PICTURE,
    config,
    encoded,
    ingest,
    write_tar,
)


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
