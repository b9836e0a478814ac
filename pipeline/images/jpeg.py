"""Decodes common JPEGs with simplejpeg, which is faster than Pillow and gives the same pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

try:
    import simplejpeg
except ImportError:  # it comes with the extra `fast`
    simplejpeg = None


def decode_upright_jpeg(image: Image.Image, data: bytes) -> NDArray[np.uint8] | None:
    """Decodes a JPEG that Pillow has opened and not loaded. Returns its pixels [height, width, 3], RGB.

    They have the image's size, which may be a fraction of the file's. None where Pillow has to decode it: other formats
    and colours, photos that have to be turned, damaged files, and without simplejpeg.
    """
    if simplejpeg is None or image.format != "JPEG" or image.mode not in ("RGB", "L") or not data:
        return None
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, "RGB", min_height=image.height, min_width=image.width, min_factor=1
        )
    except MemoryError:
        raise
    except Exception:  # Pillow says what is wrong with the file, or reads it all the same
        return None
    return pixels if pixels.shape == (image.height, image.width, 3) else None
