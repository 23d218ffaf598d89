"""Captions and masks through the real model classes, whatever the photos are like."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

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
    caption.run(CaptionConfig(captioner, max_new_tokens=5), [mixed], [output])
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
            caption.run(config, [mixed], [output])
        else:
            segment.run(settings(segmenter, batch_size=2, workers=workers), [mixed], [output])
    assert (tmp_path / "0.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()


@pytest.fixture(params=["fork", "forkserver"])
def start_method(request):
    """How Python begins processes if not asked: up to 3.13, and since 3.14."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_photos_are_decoded_and_resized_in_the_workers(captioner, rendered, monkeypatch, start_method):
    """In this process only the model runs, so that a GPU need not wait. Workers share its memory."""
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
    found = list(annotators.annotate(speak, rows, 10, 1, "test"))
    assert (seen, found) == ([10, 10, 4], [(row["id"], "", None) for row in rows])


# --- Photos of different sizes ----------------------------------------------------------------------------


@pytest.fixture
def wild(rendered, tmp_path) -> Path:
    """A shard of 24 photos, hardly two of which are equally large, and one that is broken."""
    rows = read_rows(rendered.raw, RAW)
    for n, row in enumerate(rows):
        side = (60 + 2 * n, 64) if n % 3 else (64, 90 + n)
        row["image"] = encode_image(decode_image(row["image"]).resize(side))
        row["width"], row["height"] = side
    rows[5]["image"]["bytes"] = rows[5]["image"]["bytes"][:400]
    write_rows(tmp_path / "wild.parquet", rows, RAW)
    return tmp_path / "wild.parquet"


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the batches that models are shown, (photos, height, width)."""
    shapes: list[tuple[int, ...]] = []
    for kind in (Captioner, Segmenter):

        def look(self, pixels, sizes, plain=kind.look):
            shapes.append((len(pixels), *pixels.shape[2:]))
            return plain(self, pixels, sizes)

        monkeypatch.setattr(kind, "look", look)
    return shapes


def test_captions_of_photos_of_any_size_are_made_in_full_batches(captioner, wild, seen, tmp_path):
    """The captioner sees every photo as one square; in the wild no photo is as large as the next."""
    for size in (8, 1):
        config = CaptionConfig(captioner, batch_size=size, max_new_tokens=8)
        caption.run(config, [wild], [tmp_path / f"{size}.parquet"])
    assert seen == [(8, 32, 32)] * 2 + [(7, 32, 32)] + [(1, 32, 32)] * 23
    rows = read_rows(tmp_path / "8.parquet", CAPTION)
    assert rows == read_rows(tmp_path / "1.parquet", CAPTION)
    assert len({row["caption"] for row in rows}) > 2
    assert [row["id"] for row in rows] == [row["id"] for row in read_rows(wild, RAW)]


def test_people_in_photos_of_any_size_are_those_of_one_photo_at_a_time(segmenter, wild, seen, tmp_path):
    """As Mask2Former's processor of COCO: the shorter side is given, and sides are multiples of 32."""
    source = tmp_path / "segmenter"
    shutil.copytree(segmenter.id, source)
    processor = AutoImageProcessor.from_pretrained(source)
    processor.size, processor.size_divisor = {"shortest_edge": 64, "longest_edge": 128}, 32
    processor.save_pretrained(source)
    for size in (4, 1):
        config = settings(ModelSource(str(source)), batch_size=size, threshold=0.2)
        segment.run(config, [wild], [tmp_path / f"{size}.parquet"])
    together = [shape for shape in seen if shape[0] > 1]
    assert len({shape[1:] for shape in seen}) > 3 and sum(photos for photos, *_ in together) > 16
    assert len(seen) < 23 + 12
    rows, alone = (read_rows(tmp_path / f"{size}.parquet", SEGMENT) for size in (4, 1))
    assert sum(len(row["segments"]) for row in rows) > 20
    for one, other, photo in zip(rows, alone, read_rows(wild, RAW), strict=True):
        assert (one["id"], one["problem"]) == (other["id"], other["problem"])
        if one["problem"]:
            continue
        mask = decode_mask(one["mask"])
        assert mask.shape == (photo["height"], photo["width"])
        assert (mask == decode_mask(other["mask"])).mean() > 0.999
        ids = [[s["segment_id"] for s in row["segments"]] for row in (one, other)]
        scores = [[s["score"] for s in row["segments"]] for row in (one, other)]
        assert ids[0] == ids[1]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def part(*names: str, side: int = 1) -> annotators.Batch:
    return annotators.Batch(list(names), [(side, side)] * len(names), torch.zeros(len(names), 3, side, side))


def test_photos_wait_for_others_that_look_equally_large():
    parts = [part("a"), part("b", side=2), part("c", "d"), part("e", "f", side=2), part("g"), part("h")]
    made = [batch.ids for batch in annotators.gathered(parts, 2)]
    assert made == [["a", "c"], ["b", "e"], ["d", "g"], ["f"], ["h"]]


def test_no_more_photos_wait_than_memory_was_promised():
    """Of very many sizes, too few are alike to fill a batch."""
    names = [f"{n}-{side}" for n in range(3) for side in range(1, 41)]
    waiting, most, made = 0, 0, []

    def parts():
        nonlocal waiting, most
        for name in names:
            waiting += 1
            most = max(most, waiting)
            yield part(name, side=int(name.split("-")[1]))

    for batch in annotators.gathered(parts(), 4):
        waiting -= len(batch)
        made.append(batch)
    assert most == 4 * annotators.WAITING + 1
    assert sorted(name for batch in made for name in batch.ids) == sorted(names)
    assert all({name.split("-")[1] for name in b.ids} == {str(b.pixels.shape[2])} for b in made)


def test_masks_of_a_shard_are_not_held_as_pixels(rendered):
    """Of 500 photos of 12 megapixels they would be 24 GB."""

    class Fake(SimpleNamespace):
        def look(self, pixels, sizes):
            return (segment.Segmentation(np.zeros((1000, 1000), np.int32)) for _ in sizes)

    fake = Fake(
        config=SegmentConfig(ModelSource("fake"), batch_size=8), revision="0",
        prepare=lambda images: torch.zeros(len(images), 3, 2, 2),
    )  # fmt: skip
    photos = read_rows(rendered.raw, RAW)
    tracemalloc.start()
    try:
        rows = segment.segments(fake, photos, "test")
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(rows) == 24 and decode_mask(rows[0]["mask"]).shape == (1000, 1000)
    assert held < 4 * 4e6, "of 24 masks of 4 MB"


@pytest.mark.parametrize(("stage", "loaded"), [(caption, "Captioner"), (segment, "Segmenter")])
def test_one_model_looks_at_several_shards(
    stage, loaded, captioner, segmenter, rendered, mixed, monkeypatch, tmp_path
):
    """Loading it takes longer than a shard; what comes out is what a job for each shard makes."""
    config = CaptionConfig(captioner) if stage is caption else settings(segmenter)
    shards = [Path(rendered.raw), mixed]
    for n, shard in enumerate(shards):
        stage.run(config, [shard], [tmp_path / f"alone-{n}.parquet"])
    kind, made = getattr(stage, loaded), []
    monkeypatch.setattr(stage, loaded, lambda config: made.append(kind(config)) or made[-1])
    together = [tmp_path / f"together-{n}.parquet" for n in range(2)]
    stage.run(config, shards, together)
    assert len(made) == 1
    for n, table in enumerate(together):
        assert table.read_bytes() == (tmp_path / f"alone-{n}.parquet").read_bytes()
    with pytest.raises(ValueError, match="raw names 2 shards, and output 1 tables"):
        stage.run(config, shards, together[:1])


def test_a_silent_captioner_is_quarantined(captioner, rendered, tmp_path, monkeypatch):
    monkeypatch.setattr(Captioner, "look", lambda self, pixels, sizes: ["a man"] + [""] * (len(pixels) - 1))
    caption.run(CaptionConfig(captioner, batch_size=12), [rendered.raw], [tmp_path / "captions.parquet"])
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
    segment.run(settings(segmenter), [mixed], [output])
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


def test_a_pass_on_a_cpu_is_no_larger_than_its_caches(segmenter, photos, monkeypatch):
    model = Segmenter(SegmentConfig(segmenter))
    looked: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, given: looked.append(len(given["pixel_values"])), with_kwargs=True
    )
    together = model(photos[:5])
    pixels = model.prepare(photos[:1])[0, 0].numel()
    monkeypatch.setattr(segment, "CPU_PIXELS", 2 * pixels + 1)
    parts = model(photos[:5])
    monkeypatch.setattr(segment, "CPU_PIXELS", 1)
    alone = model(photos[:5])
    assert looked == [5, 2, 2, 1, 1, 1, 1, 1, 1]
    for one, *others in zip(together, parts, alone, strict=True):
        assert all(np.array_equal(one.mask, other.mask) for other in others)
    assert segment.at_once(torch.empty(8, 3, 4, 4, device="meta")) == 8


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
