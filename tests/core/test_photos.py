import io

import numpy as np
import pytest
import torch
from PIL import Image

from moa.photos import pad_to_square, to_rgb

GRADIENT = np.linspace(0, 255, 20 * 30).reshape(20, 30).astype(np.uint8)


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "1", "HSV", "YCbCr"])
def test_every_mode_becomes_8_bit_rgb_of_the_same_picture(mode):
    grey = Image.fromarray(GRADIENT)
    found = to_rgb(grey.convert("P") if mode == "P" else grey.convert("RGB").convert(mode))
    assert (found.mode, found.size) == ("RGB", (30, 20))
    if mode != "1":
        assert np.abs(pixels(found) - GRADIENT[..., None].astype(int)).max() <= 4


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_16_bit_grey_is_scaled_not_clipped(mode):
    deep = GRADIENT.astype(np.uint16) * 257
    image = Image.fromarray(deep if mode == "I;16" else deep.astype(np.int32))
    assert image.mode == mode
    assert np.array_equal(pixels(to_rgb(image))[..., 0], GRADIENT)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(mode):
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.paste((10, 10, 10, 255), (0, 0, 10, 20))
    found = to_rgb(image.convert(mode))
    assert found.getpixel((15, 5)) == (255, 255, 255)
    assert found.getpixel((5, 5)) == (10, 10, 10)


def test_a_transparent_palette_colour_lies_on_white():
    image = Image.new("P", (20, 20), 0)
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.info["transparency"] = 0
    assert to_rgb(image).getpixel((3, 3)) == (255, 255, 255)


def test_a_camera_s_rotation_is_undone():
    image = Image.fromarray(np.stack([GRADIENT] * 3, -1))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    assert to_rgb(Image.open(file)).size == (20, 30)


def test_arrays_and_tensors_are_photos_too():
    rgb = np.stack([GRADIENT] * 3, -1)
    expected = pixels(Image.fromarray(rgb))
    given = [
        rgb,
        rgb.astype(np.float32) / 255,
        torch.tensor(rgb).movedim(-1, 0),
        torch.tensor(rgb).movedim(-1, 0).half() / 255,
        rgb.astype(np.uint16) * 257,
        rgb.astype(">u2") * 257,
        torch.tensor(rgb.astype(np.uint16) * 257).movedim(-1, 0),
    ]
    for photo in given:
        assert np.abs(pixels(to_rgb(photo)) - expected).max() <= 1
    assert np.array_equal(pixels(to_rgb(GRADIENT)), expected)


@pytest.mark.parametrize(
    ("photo", "message"),
    [
        (Image.new("RGB", (1, 1)), "1 × 1"),
        (Image.new("RGB", (200, 15)), "200 × 15"),
        (np.full((20, 20, 3), np.nan, np.float32), "NaN"),
        (Image.fromarray(np.full((20, 20), np.inf, np.float32)), "NaN or infinite"),
        (torch.full((3, 20, 20), float("nan")), "NaN"),
        (np.full((20, 20, 3), 3.0), "3 to 3; 0 to 1"),
        (np.full((20, 20, 3), 255), "int64; give uint8, uint16"),
        (torch.full((3, 20, 20), 255), "int64; give uint8, uint16"),
        (np.full((20, 20), 255, np.int16), "int16; give uint8"),
        (np.ones((20, 20), bool), "bool; give uint8"),
        (Image.fromarray(np.full((20, 20), 70000, np.int32)), "70000 to 70000; 0 to 65535"),
        (np.zeros((20, 20, 4), np.uint8), r"shape \(20, 20, 4\)"),
        (np.zeros((0, 20), np.float32), "20 × 0"),
    ],
)
def test_images_that_show_nothing_are_errors(photo, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(photo)


def test_a_cut_file_is_an_error_with_its_name(tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.png"):
        to_rgb(Image.open(path))


def test_what_is_no_image_is_a_type_error():
    with pytest.raises(TypeError, match="str"):
        to_rgb("photo.png")


def test_the_whole_photo_is_in_the_middle_of_a_black_square():
    square = pixels(pad_to_square(Image.new("RGB", (20, 30), "white")))
    assert square.shape == (30, 30, 3)
    assert square[:, 5:25].min() == 255
    assert square[:, :5].max() == square[:, 25:].max() == 0
