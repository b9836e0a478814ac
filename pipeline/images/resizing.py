"""Resizes pixels, and takes them from Pillow's images without copying."""

from __future__ import annotations

import warnings

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}

# Pixels that come from Pillow cannot be written to; torch only reads them here.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def resize(pixels: NDArray[np.uint8], size: tuple[int, int], interpolation: str) -> NDArray[np.uint8]:
    """Squashes pixels [h, w, C] of 3 or 4 channels to size (height, width), by one of INTERPOLATIONS, on the CPU.

    torch does it with antialiasing, as Pillow does, in a third to a fifth of the time. Values differ from Pillow's by 1
    at most, in a few of a thousand; by up to 4 where a side is magnified very much.
    """
    if interpolation == "nearest":  # torch would choose other pixels
        image = to_image(pixels, "RGB" if pixels.shape[2] == 3 else "CMYK")
        return np.asarray(image.resize((size[1], size[0]), INTERPOLATIONS[interpolation]))
    import torch  # here, because it takes seconds, and not all who use this room decode photos

    # The order of dimensions matters: with others, torch does not see that channels come last, and is slower.
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    squashed = torch.nn.functional.interpolate(planes, size, mode=interpolation, antialias=True)
    result: NDArray[np.uint8] = squashed[0].permute(1, 2, 0).numpy()
    return result


def to_image(pixels: NDArray[np.uint8], mode: str) -> Image.Image:
    """Makes an image of pixels [h, w, C]. mode: RGB or CMYK; of four channels RGB takes three."""
    raw = "RGBX" if mode == "RGB" and pixels.shape[2] == 4 else mode
    return Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), np.ascontiguousarray(pixels).data, "raw", raw)


def view_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Returns the pixels of an RGB or CMYK image, read only: [h, w, 4], of which the fourth means nothing in RGB.

    They are those in Pillow's memory. Only an image of more than 1 GiB, which it keeps in several pieces, is copied, to
    [h, w, 3] if RGB.
    """
    try:
        pixels: NDArray[np.uint8] = pa.array(image).flatten().to_numpy().reshape(image.height, image.width, 4)
    except ValueError:
        return np.asarray(image)
    return pixels
