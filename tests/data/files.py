"""Files of every kind that a user may have, good and bad, and a source of them put through the stages."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from moa.data.records import RAW, REJECTED, read_rows
from moa.data.sources import lock, photos
from moa.data.sources.config import PhotosConfig

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


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
