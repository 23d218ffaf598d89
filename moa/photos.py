"""Photos of subjects in whatever mode people have them → 8-bit RGB squares.

Drawing photos, too, goes through here, in an environment without PyTorch: it is not imported.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from torch import Tensor

Photo: TypeAlias = "Image.Image | np.ndarray | Tensor"

MIN_SIDE = 16
"""Smallest side of a photo in pixels: below it there is nothing to recognise."""


def to_rgb(photo: Photo) -> Image.Image:
    """A photo of any mode as 8-bit RGB, upright (EXIF), transparency on white.

    Arrays and tensors: [H, W] or [H, W, 3] and [3, H, W], uint8, uint16, or float in [0, 1].
    16-bit grey is scaled, not clipped. PIL's mode F counts as float in [0, 1].

    Raises:
        ValueError: broken, not finite, less than 16 pixels a side, or of another type (int64 does not say
        what is white).
        TypeError: no image at all.
    """
    if _is_tensor(photo):
        photo = as_array(photo)
    if isinstance(photo, np.ndarray):
        photo = from_array(photo)
    if not isinstance(photo, Image.Image):
        raise TypeError(f"a subject is a PIL image, an array or a tensor, not a {type(photo).__name__}")
    if min(photo.size) < MIN_SIDE:
        size = f"{photo.width} × {photo.height}"
        raise ValueError(f"a subject's photo is {size} pixels; it needs at least {MIN_SIDE} a side")
    try:
        return convert(ImageOps.exif_transpose(photo))
    except OSError as error:
        name = getattr(photo, "filename", "") or "a subject's photo"
        raise ValueError(f"{name} cannot be read: {error}") from error


def convert(photo: Image.Image) -> Image.Image:
    """Any mode of PIL to RGB: 16-bit grey scaled, transparency on white.

    Raises ValueError for grey of more than 8 bits whose values are out of range (see `scaled`).
    """
    if photo.mode == "F" or photo.mode.startswith("I"):
        return scaled(np.asarray(photo), 1.0 if photo.mode == "F" else 65535.0).convert("RGB")
    if photo.has_transparency_data:
        over = photo.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return photo.convert("RGB")


def _is_tensor(photo: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor; there are none before someone imports PyTorch."""
    return "torch" in sys.modules and isinstance(photo, sys.modules["torch"].Tensor)


def as_array(tensor: Tensor) -> np.ndarray:
    """A [3, H, W] or [H, W] tensor as an array [H, W, 3] or [H, W]."""
    tensor = tensor.detach().cpu()
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return (tensor.movedim(0, -1) if tensor.ndim == 3 else tensor).numpy()


def from_array(array: np.ndarray) -> Image.Image:
    """[H, W] or [H, W, 3] of uint8, uint16, or floats in [0, 1], as an 8-bit image.

    Raises:
        ValueError: another shape or type, values that are not finite or out of range.
    """
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(f"a subject's image has shape {array.shape}; [H, W] or [H, W, 3] is wanted")
    if array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array))
    if np.issubdtype(array.dtype, np.floating):
        return scaled(array, 1.0)
    if np.issubdtype(array.dtype, np.uint16):
        return scaled(array, 65535.0)
    raise ValueError(f"a subject's image is {array.dtype}; give uint8, uint16, or float from 0 to 1")


def scaled(array: np.ndarray, top: float) -> Image.Image:
    """Values from 0 to `top` as an 8-bit image; ValueError if there are others."""
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("the image has NaN or infinite pixels")
    low, high = (values.min(), values.max()) if values.size else (0.0, 0.0)
    if low < 0 or high > top:
        raise ValueError(f"the image has values from {low:g} to {high:g}; 0 to {top:g} is wanted")
    return Image.fromarray(np.round(values * (255 / top)).astype(np.uint8))


def pad_to_square(image: Image.Image) -> Image.Image:
    """The whole image in the middle of a black square (FastComposer)."""
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
