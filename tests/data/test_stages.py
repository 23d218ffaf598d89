"""From a folder to records through the real classes: a photograph, and drawn photos whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut

from moa.data import align, caption, segment
from moa.data.align import AlignConfig
from moa.data.caption import CaptionConfig
from moa.data.records import (
    CAPTION,
    RAW,
    RECORD,
    REJECTED,
    SEGMENT,
    TRUTH,
    decode_image,
    decode_mask,
    read_rows,
)
from moa.data.segment import SegmentConfig
from moa.data.sources import lock, photos
from moa.data.sources.config import PhotosConfig
from moa.evaluation.identity import MTCNNDetector
from moa.miniature.annotation import annotation_errors
from tests.data import tiny


@pytest.fixture
def taken_in(rendered, tmp_path):
    """A raw shard of a folder with the photograph, drawn photos, and what is no photo."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(astronaut()).save(folder / "astronaut.png")
    for row in read_rows(rendered.raw, RAW)[:5]:
        (folder / f"{row['id']}.png").write_bytes(row["image"]["bytes"])
    (folder / "page.jpg").write_text("<html>")
    config = PhotosConfig("folder", str(folder), "few", tmp_path / "few.sha256", held_out=0.0)
    raw, aside = tmp_path / "raw.parquet", tmp_path / "quarantined.parquet"
    lock.run(config, tmp_path / "index.parquet")
    photos.run(config, "train", 0, 1, tmp_path / "index.parquet", raw, aside)
    assert [row["id"] for row in read_rows(aside, REJECTED)] == ["page"]
    return raw


def test_a_photograph_goes_through_every_stage(taken_in, captioner, segmenter, tokenizer, tmp_path):
    names = ("captions", "segments", "records", "rejected", "phrases")
    captions, segments, records, rejected, phrases = (tmp_path / f"{name}.parquet" for name in names)
    caption.run(CaptionConfig(captioner, max_new_tokens=8), [taken_in], [captions])
    segment.run(SegmentConfig(segmenter, **tiny.LENIENT), [taken_in], [segments])
    config = AlignConfig(tokenizer, "", phrases="lexicon", max_rejected=1.0)
    align.run(config, "train", taken_in, captions, segments, records, rejected, phrases)

    listed = [row["id"] for row in read_rows(taken_in, RAW)]
    assert "astronaut" in listed and len(listed) == 6
    kept = [row["id"] for row in read_rows(records, RECORD)]
    assert sorted([*kept, *(row["id"] for row in read_rows(rejected, REJECTED))]) == sorted(listed)
    said = {row["id"]: row for row in read_rows(captions, CAPTION)}
    found = {row["id"]: row for row in read_rows(segments, SEGMENT)}
    assert said["astronaut"]["caption"] and found["astronaut"]["segments"]
    assert decode_mask(found["astronaut"]["mask"]).shape == (512, 512)


def test_the_detector_finds_the_face_of_the_photograph(taken_in):
    [row] = [row for row in read_rows(taken_in, RAW) if row["id"] == "astronaut"]
    photo = decode_image(row["image"])
    assert np.array_equal(np.asarray(photo), astronaut())
    [faces] = MTCNNDetector().detect([photo])
    left, top, right, bottom = faces.boxes[faces.scores.argmax()]
    assert left < 224 < right and top < 115 < bottom and right - left < 200


def test_on_true_masks_and_captions_everybody_is_found_again(annotated, tokenizer, tmp_path):
    """The goal is 99 %: without errors of the annotators, phrases and segments must meet."""
    paths = [tmp_path / f"{name}.parquet" for name in ("records", "rejected", "phrases")]
    config = AlignConfig(tokenizer, "", phrases="lexicon", min_area=0.0)
    align.run(config, "train", annotated.raw, annotated.captions, annotated.segments, *paths)
    shards = ((annotated.truth, TRUTH), (annotated.captions, CAPTION), (annotated.segments, SEGMENT))
    rows = [read_rows(path, schema) for path, schema in shards]
    table = {row["metric"]: row for row in annotation_errors(*rows, read_rows(paths[0], RECORD))}
    assert float(table["alignment.right"]["value"]) >= 0.99 and table["alignment.right"]["count"] > 30
    assert float(table["alignment.pairs.right"]["value"]) >= 0.99
    assert float(table["mask.iou"]["value"]) == float(table["records.kept"]["value"]) == 1
