"""The data card must add up, and the contact sheet must show the right people."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from moa.choose import spread
from moa.data import align, card, held_out
from moa.data.align import AlignConfig
from moa.data.card import CardConfig
from moa.data.errors import DataError
from moa.data.held_out import HeldOutConfig
from moa.data.parser import PHRASES, Lexicon
from moa.data.records import (
    RECORD,
    REJECTED,
    SUBJECT,
    decode_mask,
    encode_image,
    encode_mask,
    read_rows,
    write_rows,
)


@pytest.fixture
def shards(annotated, tokenizer, tmp_path):
    """A shard in which photos with small people were rejected."""
    paths = tmp_path / "records.parquet", tmp_path / "rejected.parquet", tmp_path / "phrases.parquet"
    config = AlignConfig(tokenizer, "", phrases="lexicon", min_area=0.25, max_rejected=1.0)
    align.run(config, "train", annotated.raw, annotated.captions, annotated.segments, *paths)
    assert read_rows(paths[1], REJECTED)
    return paths


def test_every_photo_is_in_the_account(shards, tmp_path):
    card.run(
        CardConfig(images=3), [shards[0]], [shards[1]], *(tmp_path / n for n in ("c.json", "c.md", "s.png"))
    )
    found = json.loads((tmp_path / "c.json").read_text())
    records, rejected = read_rows(shards[0], RECORD), read_rows(shards[1], REJECTED)
    subjects = [s for r in records for s in r["segments"]]
    assert found["photos"] == found["records"] + found["rejected"] == 24
    assert sum(found["reasons"].values()) == len(rejected)
    assert sum(found["subject_words"].values()) == sum(found["subject_area"].values()) == len(subjects)
    assert sum(found["caption_words"].values()) == sum(found["subjects_per_photo"].values()) == len(records)
    assert found["splits"] == {"train": len(records)}
    assert found["shorter_side"]["64–128"] == sum(found["shorter_side"].values()) == len(records)
    assert found["models"] == {"truth @ 0": 2 * len(records)}
    assert "count_mismatch: caption and segments disagree" in (tmp_path / "c.md").read_text()
    assert Image.open(tmp_path / "s.png").size[0] == 3 * (2 * 160 + 8)


def test_who_found_the_phrases_is_in_the_card(shards, tmp_path):
    rows = read_rows(shards[2], PHRASES)
    to = [tmp_path / name for name in ("c.json", "c.md", "s.png")]
    card.run(CardConfig(images=3), [shards[0]], [shards[1]], *to, phrases=[shards[2]])
    found = json.loads(to[0].read_text())
    assert found["models"][f"lexicon @ {Lexicon().revision}"] == len(rows) == 24
    (used,) = rows[0]["models"]
    assert used["role"] == "tokenizer"
    assert found["models"][f"{used['model']} @ {used['revision']}"] == 24


def test_areas_are_shares_of_the_photo(shards):
    record = read_rows(shards[0], RECORD)[0]
    mask = decode_mask(record["mask"])
    assert card.areas(record) == [(mask == s["segment_id"]).mean() for s in record["segments"]]


def test_the_data_hash_sees_content_not_order(shards):
    records = read_rows(shards[0], RECORD)
    first = card.data_hash(map(card.hashed, records))
    assert card.data_hash(map(card.hashed, records[::-1])) == first
    records[0]["caption"] += "."
    assert card.data_hash(map(card.hashed, records)) != first


def test_the_sheet_shows_records_from_all_over_the_shards(shards, tmp_path):
    """By their places alone: as if all shards were one list, of which some are picked."""
    records = read_rows(shards[0], RECORD)
    parts = records[:2], [], records[2:7], records[7:]
    paths = [tmp_path / f"{n}.parquet" for n in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        write_rows(path, part, RECORD)
    drawn = card.draw_sheet(CardConfig(images=5, side=60), paths, [len(part) for part in parts])
    tiles = [card.tile(record, 60) for record in spread(records, 5)]
    assert np.array_equal(np.asarray(drawn), np.asarray(card.contact_sheet(tiles, 4)))
    assert len({tile.tobytes() for tile in tiles}) == 5


def heavy(records: list, folder, count: int) -> list:
    """So many shards of 40 records, of which each photo has half a megabyte that no picture is made of."""
    ballast = np.random.default_rng(0).bytes(500_000)
    photo = records[0]["image"]["bytes"] + ballast
    paths = [folder / f"heavy-{n}.parquet" for n in range(count)]
    for path in paths:
        rows = [records[0] | {"id": f"{path.stem}-{n}", "image": {"bytes": photo}} for n in range(40)]
        write_rows(path, rows, RECORD)
    return paths


POOLS: list[pa.MemoryPool] = []  # never freed: Arrow goes on using the one in which it first opened a file


@pytest.fixture
def peak():
    """The most bytes that Python and Arrow held while something was done."""

    def measured(do) -> int:
        default = pa.default_memory_pool()
        pool = pa.proxy_memory_pool(default)
        POOLS.append(pool)
        pa.set_memory_pool(pool)
        tracemalloc.start()
        try:
            do()
            return tracemalloc.get_traced_memory()[1] + pool.max_memory()
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(default)

    return measured


def test_the_card_of_many_photos_holds_few_of_them(shards, tmp_path, peak):
    """The photos of a whole data set do not fit in memory: one row group of them must, 4 MB here."""
    paths = heavy(read_rows(shards[0], RECORD), tmp_path, 4)
    made = [tmp_path / name for name in ("c.json", "c.md", "s.png")]
    held = peak(lambda: card.run(CardConfig(images=6), paths, [shards[1]], *made))
    assert 4e6 < held < 12e6, f"{held:,} bytes, of {4 * 40 * 500_000:,} of photos"
    assert json.loads(made[0].read_text())["records"] == 160


def test_held_out_subjects_are_chosen_without_their_photos(shards, tmp_path, peak):
    alone = [record for record in read_rows(shards[0], RECORD) if len(record["segments"]) == 1]
    paths = heavy(alone, tmp_path, 4)
    held = peak(lambda: held_out.run(HeldOutConfig(subjects=2), paths, tmp_path / "subjects.parquet"))
    assert 4e6 < held < 12e6, f"{held:,} bytes, of {4 * 40 * 500_000:,} of photos"
    found = read_rows(tmp_path / "subjects.parquet", SUBJECT)
    assert [row["id"] for row in found] == ["heavy-0-0", "heavy-2-0"]
    assert {row["word"] for row in found} == {alone[0]["segments"][0]["word"]}


def test_the_overlay_tints_each_subject_in_its_own_colour():
    ids = np.array([[0, 7], [2, 2]])
    tinted = np.asarray(card.overlay(Image.new("RGB", (2, 2), "white"), ids, [7, 2]))
    assert (tinted[0, 0] == 255).all()
    assert tinted[0, 1].argmax() == 0
    assert tinted[1, 0].argmax() == 2
    assert (tinted[1, 0] == tinted[1, 1]).all()


def test_oblong_photos_keep_their_shape_on_the_sheet(shards):
    record = read_rows(shards[0], RECORD)[0]
    ids = np.zeros((20, 60), np.uint8)
    ids[:, 30:] = record["segments"][0]["segment_id"]
    black = encode_image(Image.new("RGB", (60, 20)))
    pixels = np.asarray(card.tile(record | {"image": black, "mask": encode_mask(ids)}, 60))
    photo, tinted = pixels[:60, :60], pixels[:60, 60:]
    for half in (photo, tinted):
        assert (half[:20] == 255).all() and (half[40:] == 255).all()
    assert (photo[20:40] == 0).all()
    assert (tinted[20:40, :30] == 0).all() and (tinted[20:40, 30:].argmax(axis=2) == 0).all()
    assert (tinted[20:40, 30:].max(axis=2) > 0).all()


def test_histograms_hold_their_edges():
    assert card.histogram([0, 1, 5, 10], (0, 5, 10)) == {"0–5": 2, "5–10": 2}


def test_photos_of_many_sizes_fall_into_few_bins():
    """Each in one, the smallest and the largest too."""
    sizes = [(64, 900), (1024, 1024), (4000, 3000), (3, 5), *((600 + n, 700 + n) for n in range(500))]
    found = card.histogram([min(size) for size in sizes], card.SIDES)
    assert len(found) == 10 and sum(found.values()) == len(sizes)
    assert (found["0–64"], found["64–128"], found["1024–1536"], found["2048–4096"]) == (1, 1, 77, 1)
    assert (found["512–768"], found["768–1024"]) == (168, 256)


def test_no_record_at_all_is_an_error_that_says_why(tmp_path):
    refused = [{"id": str(n), "reason": "no_segment", "detail": "nobody found"} for n in range(3)]
    none, rejected, *made = (tmp_path / name for name in ("none", "all", "c.json", "c.md", "s.png"))
    write_rows(none, [], RECORD)
    write_rows(rejected, refused, REJECTED)
    with pytest.raises(DataError, match=r"every photo was rejected \{'no_segment': 3\}"):
        card.run(CardConfig(), [none], [rejected], *made)
