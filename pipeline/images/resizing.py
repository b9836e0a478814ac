"""Resizes pixels with Pillow, and says what another way of resizing has to look like."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}

Resize = Callable[[NDArray[np.uint8], tuple[int, int], str], NDArray[np.uint8]]
"""Squashes pixels [h, w, C] to size (height, width) by one of INTERPOLATIONS, with antialiasing, as Pillow does."""


def resize_by_pillow(pixels: NDArray[np.uint8], size: tuple[int, int], interpolation: str) -> NDArray[np.uint8]:
    """Squashes pixels [h, w, C] of 3 or 4 channels to size (height, width)."""
    image = to_image(pixels, "RGB" if pixels.shape[2] == 3 else "CMYK")
    return np.asarray(image.resize((size[1], size[0]), INTERPOLATIONS[interpolation]))


def to_image(pixels: NDArray[np.uint8], mode: str) -> Image.Image:
    """Makes an image of pixels [h, w, C]. mode: RGB or CMYK; of four channels RGB takes three."""
    raw = "RGBX" if mode == "RGB" and pixels.shape[2] == 4 else mode
    return Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), np.ascontiguousarray(pixels).data, "raw", raw)


def view_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Returns the pixels of an RGB or CMYK image, read only: [h, w, 4], of which the fourth means nothing in RGB.

    They are those in Pillow's memory. Images of more than some megapixels, which it keeps in several pieces, are
    copied, to [h, w, 3] if RGB; that holds the interpreter's lock for a millisecond per megapixel.
    """
    try:
        pixels: NDArray[np.uint8] = pa.array(image).flatten().to_numpy().reshape(image.height, image.width, 4)
    except ValueError:
        return np.asarray(image)
    return pixels
