"""How far FastComposer's JPEGs, resized as tensors, move IP and PC; -s prints what docs/metrics.md says."""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, normalize, resize, to_tensor

from moa.evaluation import speed
from moa.evaluation.identity import DetectorConfig, EmbedderConfig, unit
from moa.evaluation.judges import Judges
from moa.evaluation.prompt import ClipJudge
from moa.evaluation.references import look_at_photos
from moa.evaluation.score import score_row
from moa.evaluation.speed import Pictures, SpeedConfig
from moa.methods import ModelSource
from moa.miniature.render import render

WEIGHTS = "moa/miniature/weights"
CONFIG = SpeedConfig(
    ModelSource(f"{WEIGHTS}/clip_judge"),
    ModelSource(f"{WEIGHTS}/segmenter"),
    EmbedderConfig("auto", f"{WEIGHTS}/identity"),
    DetectorConfig("segmenter", f"{WEIGHTS}/segmenter", threshold=0.5),
    subjects=4,
)
SIZE = 512  # pixels, as Stable Diffusion draws


def jpeg(image: Image.Image) -> Image.Image:
    """What `image.save("x.jpg")` leaves of it: quality 75, colours at half the resolution."""
    file = io.BytesIO()
    image.save(file, format="JPEG")
    return Image.open(file).convert("RGB")


def as_tensors(judge: ClipJudge, images: list[Image.Image]) -> np.ndarray:
    """CLIP's vectors after torchvision's bicubic resize of tensors, whose default was not to antialias."""
    known = judge.processor
    pixels = [
        resize(to_tensor(i), known.size["height"], InterpolationMode.BICUBIC, antialias=False) for i in images
    ]
    pixels = normalize(torch.stack(pixels), known.image_mean, known.image_std)
    with torch.inference_mode():
        return unit(judge.model.get_image_features(pixel_values=pixels).pooler_output.numpy())


def scores(judges: Judges, pictures: Pictures, images: list[Image.Image]) -> np.ndarray:
    """IP and PC [N, 2], as the project takes them."""
    references = look_at_photos(judges, pictures.photos)
    texts = judges.clip.text_features([row["prompt"] for row in pictures.rows])
    seen = judges.look(images)
    scored = [
        score_row(*each[:2], references, each[2]) for each in zip(pictures.rows, seen, texts, strict=True)
    ]
    return np.array([[row["ip"], row["pc"]] for row in scored])


@pytest.mark.slow
def test_jpeg_and_resized_tensors_hardly_move_the_means(monkeypatch):
    monkeypatch.setattr(speed, "render", partial(render, size=SIZE))
    pictures, judges = speed.draw(CONFIG), Judges(CONFIG)
    saved = [jpeg(image) for image in pictures.images]
    ours, theirs = (scores(judges, pictures, images) for images in (pictures.images, saved))
    texts = judges.clip.text_features([row["prompt"] for row in pictures.rows])
    tensors = (as_tensors(judges.clip, saved) * texts).sum(axis=1)
    moved = {
        "IP, JPEG": theirs[:, 0] - ours[:, 0],
        "PC, JPEG": theirs[:, 1] - ours[:, 1],
        "PC, JPEG resized as a tensor": tensors - ours[:, 1],
    }
    print(f"\n{len(saved)} images")
    for name, change in moved.items():
        print(f"{name:30} mean {change.mean():+.4f}, mean size {abs(change).mean():.4f}")
    said = [(0.0001, 0.0007), (0.0004, 0.0010), (-0.0073, 0.0174)]  # means and sizes in docs/metrics.md
    for change, (mean, size), near in zip(moved.values(), said, (0.0004, 0.0004, 0.002), strict=True):
        assert change.mean() == pytest.approx(mean, abs=near)
        assert abs(change).mean() == pytest.approx(size, abs=near)
