"""Captions and masks through the real model classes, whatever the photos are like."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

from moa.data import annotators, caption, segment
from moa.data.caption import CaptionConfig, Captioner, mend
from moa.data.errors import DataError
from moa.data.records import (
    CAPTION,
    RAW,
    SEGMENT,
    decode_image,
    decode_mask,
    encode_image,
    read_rows,
    write_rows,
)
from moa.data.segment import SegmentConfig, Segmenter, panoptic
from moa.methods import ModelSource
from tests.data import tiny


def settings(source: ModelSource, **changes) -> SegmentConfig:
    """A segmenter so lenient that random weights find somebody."""
    return SegmentConfig(source, **tiny.LENIENT | changes)


@pytest.fixture(scope="module")
def photos(rendered) -> list[Image.Image]:
    return [decode_image(row["image"]) for row in read_rows(rendered.raw, RAW)]


@pytest.fixture
def mixed(rendered, tmp_path) -> Path:
    """A shard of a good, a cut, an empty, and a larger, oblong photo."""
    rows = read_rows(rendered.raw, RAW)[:4]
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:400]
    rows[2]["image"]["bytes"] = b""
    rows[3]["image"] = encode_image(decode_image(rows[3]["image"]).resize((90, 70)))
    write_rows(tmp_path / "mixed.parquet", rows, RAW)
    return tmp_path / "mixed.parquet"


# --- Captions ---------------------------------------------------------------------------------------------


def test_every_photo_gets_a_row_and_broken_ones_say_why(captioner, mixed, tmp_path):
    """One rotten file must not stop a run of thousands, nor vanish from the account."""
    output = tmp_path / "captions.parquet"
    caption.run(CaptionConfig(captioner, max_new_tokens=5), mixed, output)
    rows = read_rows(output, CAPTION)
    assert [row["id"] for row in rows] == [row["id"] for row in read_rows(mixed, RAW)]
    assert rows[0]["caption"]
    assert rows[3]["caption"]
    assert [row["caption"] for row in rows[1:3]] == [None, None]
    assert all(row["problem"].startswith("broken_image: ") for row in rows[1:3])
    assert json.loads(rows[0]["settings"])["max_new_tokens"] == 5
    assert rows[0]["revision"].startswith("sha256:")


def test_captions_do_not_depend_on_the_batch(captioner, photos):
    """Otherwise the same photo is described differently in another shard."""
    speak = Captioner(CaptionConfig(captioner, max_new_tokens=8))
    together = speak(photos[:8])
    assert together == [text for photo in photos[:8] for text in speak([photo])]
    assert len(set(together)) > 1, "the photo must matter"
    assert not any("<image>" in text or "<|" in text for text in together)


def test_captions_are_what_plain_generation_gives(captioner, photos):
    """Cutting off the image's placeholders must cut off nothing else."""
    speak = Captioner(CaptionConfig(captioner, max_new_tokens=8))
    inputs = speak.processor(images=photos[:1], return_tensors="pt")
    tokens = speak.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert speak(photos[:1]) == [
        speak.processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    ]


@pytest.mark.parametrize("stage", ["caption", "segment"])
def test_workers_change_nothing(stage, captioner, segmenter, mixed, tmp_path):
    """Decoded and resized in processes of their own, broken photos and other sizes among them."""
    for workers in (0, 2):
        output = tmp_path / f"{workers}.parquet"
        if stage == "caption":
            config = CaptionConfig(captioner, batch_size=2, max_new_tokens=5, workers=workers)
            caption.run(config, mixed, output)
        else:
            segment.run(settings(segmenter, batch_size=2, workers=workers), mixed, output)
    assert (tmp_path / "0.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()


def test_photos_are_decoded_and_resized_in_the_workers(captioner, rendered, tmp_path, monkeypatch):
    """In this process only the model runs, so that a GPU need not wait."""
    here, seen = os.getpid(), []

    def prepare(images):
        assert os.getpid() != here
        return torch.zeros(len(images), 3, 32, 32)

    def decode(image):
        assert os.getpid() != here
        return decode_image(image)

    speak = Captioner(CaptionConfig(captioner))
    monkeypatch.setattr(speak, "prepare", prepare)
    monkeypatch.setattr(speak, "look", lambda pixels, sizes: seen.append(len(pixels)) or [""] * len(pixels))
    monkeypatch.setattr(annotators, "decode_image", decode)
    rows = read_rows(rendered.raw, RAW)
    found, problems = annotators.annotate(speak, rows, 10, 1, "test")
    assert (seen, list(found), problems) == ([10, 10, 4], [row["id"] for row in rows], {})


def test_a_silent_captioner_is_quarantined(captioner, rendered, tmp_path, monkeypatch):
    monkeypatch.setattr(Captioner, "look", lambda self, pixels, sizes: ["a man"] + [""] * (len(pixels) - 1))
    caption.run(CaptionConfig(captioner, batch_size=12), rendered.raw, tmp_path / "captions.parquet")
    rows = read_rows(tmp_path / "captions.parquet", CAPTION)
    silent = [row for row in rows if row["caption"] is None]
    assert len(silent) == 22
    assert {row["problem"].partition(":")[0] for row in silent} == {"empty_caption"}


def test_the_revision_changes_with_the_weights_alone(captioner, tmp_path):
    """A row must tell which weights spoke, even when a folder was trained anew in place."""
    folder = tmp_path / "captioner"
    shutil.copytree(captioner.id, folder)
    before = Captioner(CaptionConfig(ModelSource(str(folder)))).revision
    (folder / "recipe.json").write_text("{}")
    assert Captioner(CaptionConfig(ModelSource(str(folder)))).revision == before
    model = Captioner(CaptionConfig(ModelSource(str(folder)))).model
    with torch.no_grad():
        model.query_tokens += 1
    model.save_pretrained(folder)
    assert Captioner(CaptionConfig(ModelSource(str(folder)))).revision != before


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_missing_or_damaged_weights_name_key_and_folder(captioner, tmp_path, damage):
    folder = tmp_path / "captioner"
    shutil.copytree(captioner.id, folder)
    weights = folder / "model.safetensors"
    weights.unlink() if damage == "missing" else weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"models\.captioner.*captioner.*cannot be loaded.*correct"):
        Captioner(CaptionConfig(ModelSource(str(folder))))


# --- Segments ---------------------------------------------------------------------------------------------


def test_segments_are_consistent_with_their_mask(segmenter, mixed, tmp_path):
    """Training trusts ids, boxes and areas; masks are as large as their photo."""
    output = tmp_path / "segments.parquet"
    segment.run(settings(segmenter), mixed, output)
    rows = read_rows(output, SEGMENT)
    assert [row["id"] for row in rows] == [row["id"] for row in read_rows(mixed, RAW)]
    assert all(row["problem"].startswith("broken_image: ") and row["mask"] is None for row in rows[1:3])
    for row, shape in ((rows[0], (64, 64)), (rows[3], (70, 90))):
        mask = decode_mask(row["mask"])
        assert mask.shape == shape
        assert set(np.unique(mask)) - {0} == {s["segment_id"] for s in row["segments"]}
        for found in row["segments"]:
            x1, y1, x2, y2 = found["bbox"]
            assert found["label"] == "person"
            assert (mask == found["segment_id"]).sum() == found["area"]
            assert (mask[y1:y2, x1:x2] == found["segment_id"]).sum() == found["area"]
    assert any(row["segments"] for row in rows), "random weights must find somebody, or nothing is tested"


def test_segments_do_not_depend_on_the_batch(segmenter, photos):
    find = Segmenter(settings(segmenter))
    together, alone = find(photos[:4]), [find([photo])[0] for photo in photos[:4]]
    assert all((a.mask == b.mask).mean() > 0.999 for a, b in zip(together, alone, strict=True))
    assert [len(a.segments) for a in together] == [len(b.segments) for b in alone]


def test_images_of_several_sizes_are_refused(segmenter, photos):
    with pytest.raises(DataError, match="same size"):
        Segmenter(settings(segmenter))([photos[0], photos[1].resize((32, 32))])


def test_an_unknown_label_lists_the_known_ones(segmenter):
    with pytest.raises(DataError, match=r"'human' is unknown to .*background, person"):
        Segmenter(settings(segmenter, label="human"))


def logits(*masks: list[list[int]]) -> torch.Tensor:
    """Mask logits [Q, h, w]: 1 → sure, 0 → surely not."""
    return torch.tensor(masks).float() * 20 - 10


PERSON, BACKGROUND, NOTHING = [0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]


def found(classes, masks, size=(2, 2), **changes):
    return panoptic(
        torch.tensor(classes),
        masks,
        size,
        **{"threshold": 0.5, "mask_threshold": 0.5, "overlap": 0.8} | changes,
    )


def test_a_lone_person_does_not_get_the_whole_photo():
    """transformers' own post-processing hands a single segment every pixel."""
    [(label, score, pixels)] = found([PERSON, NOTHING], logits([[1, 0], [1, 0]], [[0, 1], [0, 1]]))
    assert label == 1
    assert score > 0.99
    assert pixels.tolist() == [[True, False], [True, False]]


def test_contested_pixels_go_to_the_surer_query_and_leftovers_vanish():
    classes = [PERSON, [0.0, 3.0, 0.0]]
    segments = found(classes, logits([[1, 1], [1, 0]], [[1, 1], [0, 1]]))
    assert [pixels.tolist() for _, _, pixels in segments] == [[[True, True], [True, False]]]
    both = found(classes, logits([[1, 1], [1, 0]], [[1, 1], [0, 1]]), overlap=0.3)
    assert [pixels.tolist() for _, _, pixels in both][1] == [[False, False], [False, True]]


def test_unsure_queries_and_nothing_are_left_out():
    assert found([[0.0, 0.1, 0.0], NOTHING], logits([[1, 1], [1, 1]], [[1, 1], [1, 1]])) == []


def test_masks_have_the_photo_s_size_and_stay_disjoint():
    segments = found(
        [PERSON, PERSON, BACKGROUND], logits([[1, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 1]]), (7, 9)
    )
    assert all(pixels.shape == (7, 9) for _, _, pixels in segments)
    assert sum(pixels.int() for _, _, pixels in segments).max() == 1


def test_panoptic_agrees_with_transformers_where_every_pixel_is_claimed(segmenter, photos):
    """The reference: the library's own post-processing, kept from its detour over 384 pixels."""
    processor = AutoImageProcessor.from_pretrained(segmenter.id)
    model = AutoModelForUniversalSegmentation.from_pretrained(segmenter.id)
    with torch.inference_mode():
        outputs = model(**processor(images=photos[:3], return_tensors="pt"))
    outputs.masks_queries_logits = torch.nn.functional.interpolate(
        outputs.masks_queries_logits, (384, 384), mode="bilinear", align_corners=False
    )
    keys = {"threshold": 0.0, "mask_threshold": 0.0, "overlap_mask_area_threshold": 0.0}
    reference = processor.post_process_panoptic_segmentation(outputs, **keys, label_ids_to_fuse=set())
    for i, wanted in enumerate(reference):
        ours = panoptic(
            outputs.class_queries_logits[i], outputs.masks_queries_logits[i], (384, 384), 0.0, 0.0, 0.0
        )
        assert [label for label, _, _ in ours] == [s["label_id"] for s in wanted["segments_info"]]
        for (_, _, pixels), info in zip(ours, wanted["segments_info"], strict=True):
            assert torch.equal(pixels, wanted["segmentation"] == info["id"])


def test_people_are_numbered_from_left_to_right(rendered, tmp_path, segmenter):
    find = Segmenter(settings(segmenter))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    segmentation = find([photo])[0]
    middles = [np.nonzero(segmentation.mask == s["segment_id"])[1].mean() for s in segmentation.segments]
    assert middles == sorted(middles)


def test_grey_transparent_and_deep_photos_are_read_as_rgb():
    """Web photos come in all modes; none may be clipped or shifted in silence."""
    deep = io.BytesIO()
    Image.fromarray(np.full((2, 2), 32768, np.uint16)).save(deep, format="PNG")
    assert decode_image({"bytes": deep.getvalue()}).getpixel((0, 0)) == (128, 128, 128)
    clear = io.BytesIO()
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(clear, format="PNG")
    assert decode_image({"bytes": clear.getvalue()}).getpixel((0, 0)) == (255, 255, 255)
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(turned, format="JPEG", exif=exif)
    assert decode_image({"bytes": turned.getvalue()}).size == (2, 4)
    cmyk = io.BytesIO()
    Image.new("CMYK", (2, 2), (0, 0, 0, 0)).save(cmyk, format="JPEG")
    assert decode_image({"bytes": cmyk.getvalue()}).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("decoded", "mended"),
    [
        ("a man in a red hoodie , angry", "a man in a red hoodie, angry"),
        ("two  men - close up .", "two men - close up."),
        ("", ""),
    ],
)
def test_the_captions_spaces_are_mended(decoded: str, mended: str) -> None:
    """CLIP's tokenizer decodes with spaces around punctuation, which no reader or lexicon expects."""
    assert mend(decoded) == mended
