"""What the networks see of a record: the subject's image, and its mask at the latent's size.

Pure functions: pixels in, pixels out, all chance from the generator that is handed in. Id maps are only ever
resized by picking whole pixels or turned into one mask a subject first: an average of two ids is a third
person's id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moa.data.errors import DataError
from moa.data.records import bounding_box
from moa.photos import pad_to_square

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class CropConfig:
    """How a training photo becomes the image of a subject (FastComposer's recipe; strengths are ours)."""

    size: int = 224  # side of the subject image, pixels; what the image encoder takes
    subject_background: Literal["noise", "keep"] = "noise"  # what fills the box outside the subject's mask
    flip: float = 0.5  # probability of mirroring
    rotate: float = 0.0  # up to so many degrees to either side
    zoom: float = 1.0  # enlarge up to so many times about a point near the middle, >= 1
    brightness: float = 0.0  # scale all channels by 1 ± at most this

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size {self.size} must be at least 1 pixel")
        if self.subject_background not in ("noise", "keep"):
            raise ValueError(f"subject_background {self.subject_background!r} must be 'noise' or 'keep'")
        if not (
            0 <= self.flip <= 1 and 0 <= self.rotate <= 180 and self.zoom >= 1 and 0 <= self.brightness < 1
        ):
            raise ValueError(f"{self} is outside flip 0..1, rotate 0..180, zoom >= 1, brightness 0..1")


def cut_out(image: Pixels, inside: NDArray[np.bool_], generator: np.random.Generator) -> Pixels:
    """The image [H, W, 3] with uniform noise wherever `inside` [H, W] is false."""
    noise = generator.integers(0, 256, image.shape, dtype=np.uint8)
    return np.where(inside[..., None], image, noise)


def middle_square(pixels: NDArray[Any]) -> NDArray[Any]:
    """The middle square of an image [H, W, 3] or an id map [H, W]: all of it that training sees."""
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


def photo_to_square(photo: Image.Image, size: int) -> Image.Image:
    """A whole photo as the image of a subject, as at inference: padded to a square and resized to `size`."""
    return pad_to_square(photo).resize((size, size), Image.Resampling.BICUBIC)


def subject_image(
    image: Pixels, inside: NDArray[np.bool_], config: CropConfig, generator: np.random.Generator
) -> Image.Image:
    """The image of one subject for training: cut out, cropped to its box, squared, resized, varied.

    `image` is [H, W, 3], 0..255; `inside` [H, W] is true on the subject. Returns RGB, `config.size` square.
    The same generator state gives the same pixels. Raises DataError for an empty mask or unequal sizes.
    """
    if image.shape[:2] != inside.shape:
        raise DataError(f"image is {image.shape[:2]} and mask {inside.shape} pixels; make the record again")
    x1, y1, x2, y2 = bounding_box(inside)
    box = image[y1:y2, x1:x2]
    if config.subject_background == "noise":
        box = cut_out(box, inside[y1:y2, x1:x2], generator)
    return augment(photo_to_square(Image.fromarray(box), config.size), config, generator)


def augment(image: Image.Image, config: CropConfig, generator: np.random.Generator) -> Image.Image:
    """Mirror, turn, enlarge and brighten by chance; five numbers are drawn whatever the settings."""
    flip, turn, zoom, across, light = generator.random(5)
    if flip < config.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.rotate:
        image = image.rotate(config.rotate * (2 * turn - 1), Image.Resampling.BICUBIC)
    if config.zoom > 1:
        side = image.width / (1 + zoom * (config.zoom - 1))
        left = (image.width - side) * across
        box = (left, left, left + side, left + side)
        image = image.resize(image.size, Image.Resampling.BICUBIC, box=box)
    if config.brightness:
        scale = 1 + config.brightness * (2 * light - 1)
        image = image.point(lambda value: min(255, round(value * scale)))
    return image


def resize_ids(ids: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Resize an id map [H, W] to `size` = (height, width) by picking the pixel under each new centre."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, ids.shape, strict=True)
    )
    return ids[np.ix_(rows, columns)]


def subject_masks(
    ids: NDArray[Any], segment_ids: Sequence[int], size: tuple[int, int]
) -> NDArray[np.float32]:
    """One mask a subject, [S, height, width], 0..1: the share of each latent pixel that the subject covers.

    Raises DataError if a subject is not in the id map.
    """
    missing = sorted(set(segment_ids) - set(np.unique(ids).tolist()))
    if missing:
        raise DataError(f"segments {missing} have no pixel in the mask; make the record again")
    masks = [Image.fromarray((ids == segment).astype(np.float32)) for segment in segment_ids]
    height, width = size
    resized = [np.asarray(mask.resize((width, height), Image.Resampling.BOX)) for mask in masks]
    return np.stack(resized) if resized else np.zeros((0, height, width), np.float32)
