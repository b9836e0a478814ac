"""Decodes common JPEGs and PNGs with libraries that are faster than Pillow and give the same pixels."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

try:
    import simplejpeg
except ImportError:  # it comes with the extra `fast`
    simplejpeg = None
try:
    import imagecodecs
except ImportError:  # as above
    imagecodecs = None  # type: ignore[assignment]

_MODES = ("RGB", "L")
_PLAIN_CHUNKS = (b"IHDR", b"IDAT", b"IEND", b"bKGD", b"cHRM", b"gAMA", b"pHYs", b"sBIT", b"sRGB", b"tEXt", b"tIME")
"""Chunks of a PNG that do not change its pixels: no palette, transparency, orientation, profile, or further frame."""
_TEXTS_ABOUT_PIXELS = (b"Raw profile type ", b"XML:")
"""How the texts begin in which programs hide an orientation."""


def decode_upright(image: Image.Image, data: bytes) -> NDArray[np.uint8] | None:
    """Decodes a photo that Pillow has opened and not loaded. Returns its pixels [height, width, 3], RGB.

    They have the image's size, which may be a fraction of a JPEG's own. None where Pillow has to decode it: other
    formats and colours, photos that have to be turned, damaged files, and without the libraries.
    """
    if image.mode not in _MODES or not data:
        return None
    decode = {"JPEG": _decode_jpeg, "PNG": _decode_png}.get(image.format or "")
    try:
        pixels = decode(image, data) if decode else None
    except MemoryError:
        raise
    except Exception:  # Pillow says what is wrong with the file, or reads it all the same
        return None
    return pixels if pixels is not None and pixels.shape == (image.height, image.width, 3) else None


def _decode_jpeg(image: Image.Image, data: bytes) -> NDArray[np.uint8] | None:
    if simplejpeg is None or image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        data, "RGB", min_height=image.height, min_width=image.width, min_factor=1
    )
    return pixels


def _decode_png(_: Image.Image, data: bytes) -> NDArray[np.uint8] | None:
    if imagecodecs is None or not _is_plain(data):
        return None
    pixels: NDArray[np.uint8] = imagecodecs.spng_decode(data)
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels


def _is_plain(png: bytes) -> bool:
    """Whether a PNG has 8 bits a channel, is not interlaced, and has only chunks that do not change its pixels."""
    depth, interlaced = png[24], png[28]
    if depth != 8 or interlaced:
        return False
    place, kind = 8, b""
    while kind != b"IEND" and place + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, place)
        place += 8
        if kind not in _PLAIN_CHUNKS or (kind == b"tEXt" and png.startswith(_TEXTS_ABOUT_PIXELS, place)):
            return False
        place += length + 4
    return kind == b"IEND"
