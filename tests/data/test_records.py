"""Tables must come back as they were written, or not at all and with a reason."""

from __future__ import annotations

import io

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moa.data import records
from moa.data.errors import BrokenImage, DataError
from moa.data.records import (
    CAPTION,
    RAW,
    RECORD,
    REJECTED,
    SEGMENT,
    SUBJECT,
    TRUTH,
    bounding_box,
    decode_image,
    decode_mask,
    encode_image,
    encode_mask,
    read_rows,
    sha256,
    write_rows,
)
from moa.files import write_atomically
from moa.photos import to_rgb

IMAGE = encode_image(np.arange(48, dtype=np.uint8).reshape(4, 4, 3), "a.png")
MASK = encode_mask(np.eye(4, dtype=np.int32))
FOUND = {"segment_id": 1, "label": "person", "score": 0.5, "bbox": [0, 0, 4, 4], "area": 4}
NAMED = {
    "segment_id": 1,
    "word": "man",
    "start": 0,
    "end": 5,
    "bbox": [0, 0, 4, 4],
    "label": "person",
    "score": 0.5,
}
MODEL = {"model": "m", "revision": "r", "settings": "{}"}
ROWS = {
    "raw": (RAW, {"id": "a", "image": IMAGE, "sha256": "0", "width": 4, "height": 4, "source": "s"}),
    "caption": (CAPTION, {"id": "a", "caption": None, "problem": "empty_caption: x", **MODEL}),
    "segment": (SEGMENT, {"id": "a", "mask": MASK, "segments": [FOUND], "problem": None, **MODEL}),
    "record": (
        RECORD,
        {
            **{"id": "a", "image": IMAGE, "width": 4, "height": 4, "caption": "a man", "segments": [NAMED]},
            **{"mask": MASK, "split": "train", "source": "s", "sha256": "0", "caption_model": "c"},
            **{"caption_revision": "1", "segment_model": "d", "segment_revision": "2"},
        },
    ),
    "rejected": (REJECTED, {"id": "a", "reason": "no_segment", "detail": "nobody found"}),
    "subject": (SUBJECT, {"id": "a", "identity": "a", "word": "man", "image": IMAGE, "sha256": "0"}),
    "truth": (TRUTH, {"id": "a", "scene": "{}", "caption": "a man", "mask": MASK, "labels": "[]"}),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_come_back_as_they_were_written(kind, tmp_path):
    schema, row = ROWS[kind]
    write_rows(tmp_path / "t.parquet", [row, row], schema)
    assert read_rows(tmp_path / "t.parquet", schema) == [row, row]
    write_rows(tmp_path / "none.parquet", [], schema)
    assert read_rows([tmp_path / "none.parquet", tmp_path / "t.parquet"], schema) == [row, row]


def test_single_rows_and_columns_are_what_the_whole_file_holds(tmp_path):
    """From one row group and the next; a place that is not there is an error, not another photo."""
    rows = [ROWS["record"][1] | {"id": str(n), "image": IMAGE | {"path": str(n)}} for n in range(70)]
    path = tmp_path / "t.parquet"
    write_rows(path, rows, RECORD)
    assert pq.ParquetFile(path).num_row_groups == 9
    assert records.count_rows(path, RECORD) == 70
    assert records.read_at(path, RECORD, [69, 0, 8, 7]) == [rows[n] for n in (69, 0, 8, 7)]
    columns = ["id", "segments"]
    assert read_rows(path, RECORD, columns) == [{name: row[name] for name in columns} for row in rows]
    for place in (-1, 70):
        with pytest.raises(IndexError, match=f"no row {place} of 70"):
            records.read_at(path, RECORD, [place])


def test_the_same_rows_give_the_same_bytes(tmp_path):
    """A rerun that changes nothing must not make later results look changed."""
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.parquet", [ROWS["record"][1]], RECORD)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_datasets_opens_records_and_decodes_their_images(tmp_path):
    """The records are meant to be shared; `datasets` is how others read them."""
    write_rows(tmp_path / "r.parquet", [ROWS["record"][1]], RECORD)
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "r.parquet"), cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded.features["image"], datasets.Image)
    assert isinstance(loaded[0]["image"], Image.Image)
    assert loaded[0]["segments"][0]["bbox"] == [0, 0, 4, 4]


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text"])
def test_a_damaged_file_is_named_with_the_cure(damage, tmp_path):
    path = tmp_path / "shard.parquet"
    write_rows(path, [ROWS["raw"][1] | {"id": str(i)} for i in range(50)], RAW)
    data = bytearray(path.read_bytes())
    data[100] ^= 255
    wrong = {"cut": data[: len(data) // 2], "empty": b"", "flipped": data, "text": b"id,image\n" * 99}
    path.write_bytes(bytes(wrong[damage]))
    with pytest.raises(DataError, match=r"shard\.parquet is cut short or damaged .*delete it and run"):
        read_rows(path, RAW)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"shard\.parquet does not exist"):
        read_rows(tmp_path / "shard.parquet", RAW)


def test_a_table_of_another_kind_names_its_columns(tmp_path):
    write_rows(tmp_path / "t.parquet", [ROWS["caption"][1]], CAPTION)
    with pytest.raises(DataError, match=r"t\.parquet is no raw/1 table: missing columns .*'image'"):
        read_rows(tmp_path / "t.parquet", RAW)


def test_a_column_of_another_type_is_named(tmp_path):
    table = records.read_table(_written(tmp_path), RAW)
    wrong = table.set_column(3, "width", table["width"].cast("int64"))
    pq.write_table(wrong, tmp_path / "t.parquet")
    with pytest.raises(DataError, match="column 'width' is int64, not int32"):
        read_rows(tmp_path / "t.parquet", RAW)


def _written(folder):
    write_rows(folder / "t.parquet", [ROWS["raw"][1]], RAW)
    return folder / "t.parquet"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": "four"}, "column 'width' must be int32"),
        ({"width": 2**40}, "column 'width' must be int32"),
        ({"sha256": None}, "column 'sha256' must not be empty"),
        ({"sha": "0"}, "check sha$"),
    ],
)
def test_a_bad_row_is_refused_and_the_old_file_stays(change, message, tmp_path):
    """A stage that fails half-way must leave nothing that looks like a result."""
    path = _written(tmp_path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=message):
        write_rows(path, [ROWS["raw"][1] | change], RAW)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_a_failed_write_leaves_no_file(tmp_path):
    def write(path):
        path.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_atomically(tmp_path / "folder" / "t.json", write)
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize("grey", [100, 255, 32768, 65535])
def test_deep_grey_is_read_as_the_pipeline_reads_it(grey):
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16), grey, np.uint16)).save(file, format="PNG")
    found = decode_image({"bytes": file.getvalue()})
    assert found.getpixel((0, 0)) == (round(grey / 257),) * 3
    assert found == to_rgb(Image.open(file))


def test_grey_out_of_range_is_a_broken_image():
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16), 70000, np.int32)).save(file, format="TIFF")
    with pytest.raises(BrokenImage, match="values from 70000"):
        decode_image({"bytes": file.getvalue()})


@pytest.mark.parametrize("largest", [0, 1, 255, 256, 65535])
def test_masks_come_back_exactly(largest):
    mask = np.zeros((5, 7), np.int32)
    mask[2, 3] = largest
    assert np.array_equal(decode_mask(encode_mask(mask)), mask)
    assert decode_mask(encode_mask(mask)).dtype == np.int32


def test_bad_masks_are_refused():
    for bad in (np.full((2, 2), -1), np.full((2, 2), 65536), np.zeros((2, 2, 3), int)):
        with pytest.raises(DataError, match="id map"):
            encode_mask(bad)
    with pytest.raises(DataError, match="single-channel"):
        decode_mask(IMAGE["bytes"])
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_mask(MASK[:40])


def test_images_come_back_exactly_and_broken_ones_say_so():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 5, 3), np.uint8)
    value = encode_image(pixels)
    assert np.array_equal(np.asarray(decode_image(value)), pixels)
    for data in (b"", b"no image", value["bytes"][:60], value["bytes"][:-60], None):
        with pytest.raises(BrokenImage):
            decode_image({"bytes": data, "path": None})
    assert sha256(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_boxes_hold_the_subject_and_nothing_more():
    inside = np.zeros((6, 8), bool)
    inside[2:4, 3:7] = True
    assert bounding_box(inside) == [3, 2, 7, 4]
    with pytest.raises(DataError, match="empty mask"):
        bounding_box(np.zeros((2, 2), bool))
