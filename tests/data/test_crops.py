"""The subject's image and masks on cases that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from moa.data import crops
from moa.data.crops import CropConfig
from moa.data.errors import DataError

PLAIN = CropConfig(size=8, flip=0.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def photo() -> tuple[np.ndarray, np.ndarray]:
    """A red subject, 4 × 4 pixels with a missing corner, on green."""
    image = np.full((16, 16, 3), (0, 255, 0), np.uint8)
    inside = np.zeros((16, 16), bool)
    inside[5:9, 6:10] = True
    inside[5, 6] = False
    image[inside] = (255, 0, 0)
    return image, inside


def test_the_subject_fills_the_crop_and_the_rest_of_the_box_is_noise(photo):
    """A background that leaks into the subject image teaches the model to copy it."""
    crop = np.asarray(crops.subject_image(*photo, CropConfig(size=4, flip=0.0), rng()))
    assert (crop[1:, 1:] == (255, 0, 0)).all()
    assert (crop[0, 0] != (0, 255, 0)).any()
    kept = crops.subject_image(*photo, CropConfig(size=4, flip=0.0, subject_background="keep"), rng())
    assert kept.getpixel((0, 0)) == (0, 255, 0)


def test_the_same_generator_gives_the_same_pixels_and_another_one_others(photo):
    config = CropConfig(size=8, rotate=20, zoom=1.4, brightness=0.3)
    first, same, other = (crops.subject_image(*photo, config, rng(seed)).tobytes() for seed in (1, 1, 2))
    assert first == same != other


def test_an_oblong_box_is_padded_not_stretched():
    image = np.full((10, 10, 3), 255, np.uint8)
    inside = np.zeros((10, 10), bool)
    inside[2:10, 3:7] = True
    crop = np.asarray(crops.subject_image(image, inside, PLAIN, rng()))
    assert (crop[:, 2:6] == 255).all()
    assert (crop[:, :2] == 0).all()
    assert (crop[:, 6:] == 0).all()


def test_the_whole_photo_at_inference_keeps_its_shape():
    photo = Image.new("RGB", (30, 10), "white")
    squared = np.asarray(crops.photo_to_square(photo, 30))
    assert squared.shape == (30, 30, 3)
    assert (squared[12:18] > 240).all()
    assert (squared[:8] < 15).all()


def test_mirroring_happens_as_often_as_asked(photo):
    """Flipping always or never is another recipe."""
    image, inside = photo
    image[:, :7] = 0

    def mirrored(probability: float, seed: int) -> bool:
        config = CropConfig(size=4, flip=probability, subject_background="keep")
        return crops.subject_image(image, inside, config, rng(seed)).getpixel((3, 3)) == (0, 0, 0)

    assert not any(mirrored(0.0, seed) for seed in range(20))
    assert all(mirrored(1.0, seed) for seed in range(20))
    assert 60 < sum(mirrored(0.5, seed) for seed in range(200)) < 140


def test_settings_do_not_shift_each_other_s_chance(photo):
    """Two runs that differ in one setting must differ in that alone."""
    image, inside = photo
    generators = rng(3), rng(3)
    crops.subject_image(image, inside, PLAIN, generators[0])
    crops.subject_image(image, inside, CropConfig(size=8, flip=1.0, zoom=2.0, rotate=9), generators[1])
    assert generators[0].random() == generators[1].random()


def test_zoom_shows_a_part_and_brightness_scales(photo):
    image = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[:, None, None], (1, 64, 3)))
    zoomed = np.asarray(crops.augment(image, CropConfig(flip=0, zoom=2.0), rng(1))).astype(int)
    assert 31 <= np.ptp(zoomed) <= 60
    bright = np.asarray(crops.augment(image, CropConfig(flip=0, brightness=0.5), rng(1))).astype(float)
    ratio = bright[63, 0, 0] / 63
    assert 0.5 <= ratio <= 1.5
    assert bright[30, 0, 0] == pytest.approx(30 * ratio, abs=1)


def test_an_empty_or_ill_fitting_mask_is_an_error(photo):
    with pytest.raises(DataError, match="empty mask"):
        crops.subject_image(photo[0], np.zeros((16, 16), bool), PLAIN, rng())
    with pytest.raises(DataError, match="make the record again"):
        crops.subject_image(photo[0], np.ones((8, 8), bool), PLAIN, rng())


@pytest.mark.parametrize(
    "change", [{"flip": 1.5}, {"zoom": 0.5}, {"size": 0}, {"subject_background": "blur"}]
)
def test_impossible_settings_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        CropConfig(**change)


@pytest.mark.parametrize("size", [(3, 3), (5, 9), (16, 16), (40, 23)])
def test_resized_id_maps_hold_no_new_ids(size):
    """Averaging ids 1 and 3 would invent person 2 along the edge: a known fault of older loaders."""
    ids = np.zeros((16, 16), np.int32)
    ids[:, :6], ids[:, 6:] = 1, 3
    resized = crops.resize_ids(ids, size)
    assert resized.shape == size
    assert set(np.unique(resized)) == {1, 3}
    assert np.array_equal(crops.resize_ids(ids, (16, 16)), ids)
    assert np.array_equal(crops.resize_ids(np.kron(ids, np.ones((3, 3), int)), (16, 16)), ids)


def test_latent_masks_are_the_covered_share():
    ids = np.zeros((8, 8), np.int32)
    ids[:, :3], ids[0, 7] = 7, 2
    masks = crops.subject_masks(ids, [2, 7], (4, 4))
    assert masks.shape == (2, 4, 4)
    assert masks[1].tolist() == [[1.0, 0.5, 0.0, 0.0]] * 4
    assert masks[0, 0, 3] == 0.25
    assert masks[0].sum() == 0.25
    assert crops.subject_masks(ids, [], (4, 4)).shape == (0, 4, 4)
    with pytest.raises(DataError, match=r"segments \[5\]"):
        crops.subject_masks(ids, [2, 5], (4, 4))
