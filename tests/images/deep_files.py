"""Makes files of more than 8 bits per channel, with exactly the wanted bits."""

from __future__ import annotations

import io
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.images.hostile import grey_tags, png, tiff


def deep(pixels: NDArray[np.uint16], bits: int) -> NDArray[np.uint16]:
    """8 bits stretched to more: 255 becomes the greatest number."""
    return np.rint(pixels * ((2**bits - 1) / 255)).astype(np.uint16)


def as_png(pixels: NDArray[np.uint16], *chunks: tuple[bytes, bytes], colour: int | None = None) -> bytes:
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    kind = {1: 0, 3: 2, 4: 6}[channels] if colour is None else colour
    return png(pixels.shape[1], pixels.shape[0], *chunks, (b"IDAT", zlib.compress(rows)), depth=16, colour=kind)


def as_tiff(pixels: NDArray[np.uint16], order: str = "<", **tags: object) -> bytes:
    colours = {} if pixels.ndim == 2 else {"t258": ("H", [16] * 3), "t262": ("H", [2]), "t277": ("H", [3])}
    every = {"t258": ("H", [16]), **colours, **tags}
    data = pixels.astype(f"{order}u2").tobytes()
    return tiff(grey_tags(pixels.shape[1], pixels.shape[0], len(data), **every), data, order=order)  # type: ignore[arg-type]


def as_lzw(pixels: NDArray[np.uint16]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "TIFF", compression="tiff_lzw")
    return buffer.getvalue()


def as_pnm(pixels: NDArray[np.uint16], most: int = 65535) -> bytes:
    head = b"P5" if pixels.ndim == 2 else b"P6"
    return head + b"\n%d %d\n%d\n" % (pixels.shape[1], pixels.shape[0], most) + pixels.astype(">u2").tobytes()
