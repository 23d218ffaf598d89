"""The scoring benchmark compares the same work, sees a difference, and writes its table."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import open_clip
import pytest
from test_score import judges

from moa.data.benchmark import random_mask2former
from moa.evaluation import speed
from moa.evaluation.speed import COLUMNS, VIT_L14, SpeedConfig
from moa.methods import ModelSource
from tests.data.test_data_benchmark import TINY_MASK2FORMER

__all__ = ["judges"]  # a fixture
PACKAGE = "facenet-pytorch's"
CONFIG = SpeedConfig(
    ModelSource("c"), ModelSource("s"), subjects=2, prompts=3, batch_size=4, repeats=1, true_size_images=2
)
SMALL = VIT_L14 | {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "patch_size": 56}


@pytest.fixture
def table(judges, tmp_path, monkeypatch):
    """The whole stage with untrained judges, and with a CLIP of few parameters."""
    monkeypatch.setattr(speed, "Judges", lambda config: judges)
    monkeypatch.setattr(speed, "VIT_L14", SMALL)
    monkeypatch.setattr(
        speed, "random_mask2former",
        lambda folder, side, true_size: random_mask2former(folder, 64, False, **TINY_MASK2FORMER),
    )  # fmt: skip
    speed.run(CONFIG, tmp_path / "scoring.csv")
    return list(csv.DictReader((tmp_path / "scoring.csv").open()))


def test_batches_change_no_score(table):
    assert [tuple(row) for row in table] == [COLUMNS] * 6
    assert [row["what"] for row in table] == ["look", "score", "facenet", "clip", "mtcnn", "mask2former"]
    assert [(row["images"], row["batch_size"]) for row in table] == [("6", "4")] * 2 + [("2", "2")] * 4
    assert [row["models"] for row in table[2:]] == [*["true size, random"] * 2, PACKAGE, "true size, random"]
    for row in table:
        bound = 1e-2 if row["what"] == "mtcnn" else 1e-5  # boxes are in pixels
        assert float(row["largest_difference"]) <= bound
        one, batch = float(row["seconds_one"]), float(row["seconds_batch"])
        assert float(row["speedup"]) == pytest.approx(one / batch, rel=0.01)


def test_a_judge_that_minds_its_neighbours_is_seen(judges, monkeypatch):
    pictures = speed.draw(CONFIG)
    real = judges.clip.image_features
    monkeypatch.setattr(judges.clip, "image_features", lambda images: real(images) + 1e-3 * len(images))
    ways = [lambda size=size: speed.look(judges, pictures.images, size) for size in (1, 4)]
    found = speed.compare(*ways, repeats=1, name="test")
    assert found["largest_difference"] == pytest.approx(2e-3, rel=1e-3)  # the judges take three at once


def test_one_at_a_time_nothing_is_kept_and_in_batches_nothing_is_done_twice(judges, monkeypatch):
    pictures, looked, read = speed.draw(CONFIG), [], []
    look, text = judges.look, judges.clip.text_features
    monkeypatch.setattr(judges, "look", lambda images: looked.append(len(images)) or look(images))
    monkeypatch.setattr(judges.clip, "text_features", lambda texts: read.append(len(texts)) or text(texts))
    size = judges.config.batch_size
    speed.score(judges, pictures, 1)
    assert (looked, read) == ([1, 1] * 6, [1] * 6)
    looked.clear(), read.clear()
    speed.score(judges, pictures, 6)
    prompts = len({row["prompt"] for row in pictures.rows})
    assert prompts == 3
    assert (looked, read) == ([2, *[size] * (6 // size)], [prompts])


def test_mtcnn_is_given_faces_to_find():
    """Nothing would be compared in pictures in which it finds nobody."""
    images = speed.draw(replace(CONFIG, prompts=12)).images[: SpeedConfig.true_size_images]
    values = speed.detected("cpu", images)(len(images))
    assert values.shape == (8, 6) and values[:, 0].any()


def test_the_segmenter_s_queries_are_compared(monkeypatch):
    monkeypatch.setattr(
        speed, "random_mask2former",
        lambda folder, side, true_size: random_mask2former(folder, 64, False, **TINY_MASK2FORMER),
    )  # fmt: skip
    look = speed.segments("cpu", speed.draw(CONFIG).images[:3])
    classes, masks = 6 * 134, 6 * 16 * 16
    assert look(1).shape == look(2).shape == (3, classes + masks)
    assert np.ptp(look(1)[:, :classes]) > 0.1 and np.ptp(look(1)[:, classes:]) > 0.1


def test_pictures_are_of_their_subjects_and_the_same_every_time():
    one, again = speed.draw(CONFIG), speed.draw(CONFIG)
    assert [r["subjects"] for r in one.rows] == [[name] for name in one.photos for _ in range(3)]
    assert all(np.array_equal(a, b) for a, b in zip(one.images, again.images, strict=True))
    assert len({image.tobytes() for image in one.images}) == 6


def test_true_size_is_that_of_the_published_models():
    theirs = open_clip.get_model_config("ViT-L-14")
    vision = theirs["vision_cfg"]
    sizes = (vision["width"], vision["layers"], vision["patch_size"], vision["image_size"])
    ours = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")
    assert tuple(VIT_L14[name] for name in ours) == sizes
    assert VIT_L14["hidden_size"] // VIT_L14["num_attention_heads"] == vision.get("head_width", 64)
    assert sum(p.numel() for p in speed.RandomFaceNet("cpu").model.parameters()) == 23_482_624


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"repeats \(0\) must be at least 1"):
        SpeedConfig(ModelSource("c"), ModelSource("s"), repeats=0)
