"""Reads photos of more than 8 bits per channel, and chooses which of their values become black and white."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, TiffImagePlugin

from pipeline.images.formats import FORMATS

BITS = (8, 10, 12, 14, 16)
"""Depths of cameras, in bits per channel."""

_PIECE = 1 << 18
"""Pixels that are converted at a time: the 64-bit numbers of a whole photo would take gigabytes."""

_WHITE_TAGS = (281, 341, 50717)
"""TIFF tags MaxSampleValue, SMaxSampleValue, and WhiteLevel (DNG)."""
_BITS_PER_SAMPLE, _PLANAR = 258, 284

_LOWER = {f"{mode};16{order}": f"{mode};16{other}" for mode in ("RGB", "RGBA") for order, other in ("BL", "LB", "NB")}
"""Pillow's raw modes for 16-bit colour take the upper byte; each maps to the mode that takes the lower one."""


class Span(NamedTuple):
    """The values of a file that become black and white. Values beyond them are cut."""

    low: float
    high: float

    @property
    def bits(self) -> int | None:
        """The smallest depth of BITS that holds the span, if it consists of whole numbers from 0 on; else None."""
        if self.low or self.high < 2 or not float(self.high).is_integer():
            return None
        return next((bits for bits in BITS if self.high < 2**bits), None)

    @property
    def extremes(self) -> Extremes:
        """Those of a photo that fills it."""
        return Extremes(self.low, self.high, self.bits is not None)


class Extremes(NamedTuple):
    """The lowest and highest value of a photo, and whether its values are whole numbers."""

    low: float
    high: float
    whole: bool


def depth_span(bits: int) -> Span:
    """Returns the span of whole numbers with so many bits."""
    return Span(0.0, 2.0**bits - 1)


def choose_span(found: Sequence[Extremes]) -> Span:
    """Chooses one span for photos that belong together: the smallest depth of BITS that holds all of their values.

    For fractions, and for whole numbers that no depth holds, it is 0 to 1 or the smallest depth that holds all values,
    provided that they fill half of it. Otherwise it reaches from the lowest value to the highest.
    """
    low, high = min(item.low for item in found), max(item.high for item in found)
    whole = all(item.whole for item in found)
    candidates = [depth_span(bits) for bits in BITS] if whole else [Span(0.0, 1.0), *map(depth_span, BITS)]
    span = next((span for span in candidates if span.low <= low and high <= span.high), None)
    if span is not None and (whole or high - low >= span.high / 2):
        return span
    return Span(low, high)


@dataclass(frozen=True, eq=False)
class DeepPixels:
    """The values of a deep photo.

    read: returns the values in a box (left, top, right, bottom) as [height, width(, channels)]. stated: the span that
    the file itself states; None if it states none.
    """

    width: int
    height: int
    read: Callable[[tuple[int, int, int, int]], NDArray[Any]]
    stated: Span | None

    def extremes(self) -> Extremes:
        """Finds the lowest and highest value of all colours. Alpha, NaN and infinities do not count."""
        low, high, whole = np.inf, -np.inf, True
        for _, values in self._pieces():
            colours = values[..., :3] if values.ndim == 3 else values
            whole = whole and colours.dtype.kind in "iu"
            known = colours if whole else colours[np.isfinite(colours)]
            if known.size:
                low, high = min(low, float(known.min())), max(high, float(known.max()))
        return Extremes(low, high, whole) if low <= high else Extremes(0.0, 0.0, whole)

    def render(self, span: Span) -> tuple[Image.Image, int]:
        """Converts the photo to 8 bits per channel. Also returns the number of pixels with values beyond the span."""
        result: NDArray[np.uint8] | None = None
        cut, table = 0, _table(span)
        for (rows, columns), values in self._pieces():
            if result is None:
                result = np.empty((self.height, self.width, *values.shape[2:]), dtype=np.uint8)
            result[rows, columns] = table[values] if values.dtype.kind == "u" else _scale(values, span)
            colours = values[..., :3] if values.ndim == 3 else values[..., None]
            with np.errstate(invalid="ignore"):
                cut += int(np.count_nonzero(((colours < span.low) | (colours > span.high)).any(axis=-1)))
        assert result is not None
        return Image.fromarray(result), cut

    def _pieces(self) -> Iterator[tuple[tuple[slice, slice], NDArray[Any]]]:
        columns = min(self.width, _PIECE)
        rows = max(1, _PIECE // columns)
        for top in range(0, self.height, rows):
            for left in range(0, self.width, columns):
                bottom, right = min(top + rows, self.height), min(left + columns, self.width)
                yield (slice(top, bottom), slice(left, right)), self.read((left, top, right, bottom))


def may_be_deep(data: bytes) -> bool:
    """Whether a file may have more than 8 bits per channel, judging by its first bytes."""
    if data.startswith(b"\x89PNG"):
        return data[24:25] == b"\x10"
    return data.startswith((b"II", b"MM", b"P2", b"P3", b"P5", b"P6", b"Pf", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  "))


def states_depth(image: Image.Image, data: bytes) -> bool:
    """Whether the file of an opened photo states the depth of its values."""
    codec = _codec(image)
    if codec in ("ppm", "ppm_plain"):
        return codec == "ppm_plain" or _greatest(image) != 65535
    return _stated(image, data) is not None


def read_deep(image: Image.Image, data: bytes, turn: Callable[[Image.Image], object]) -> DeepPixels | None:
    """Reads the values of an opened photo, whose pixels are not loaded yet. None if it has 8 bits per channel.

    turn: loads an image and turns it upright. Raises whatever decoders raise.
    """
    codec = _codec(image)
    if codec == "ppm":
        return _read_pnm(image, data)
    lower = _open_lower(image, data) if codec in ("zip", "raw", "libtiff") else None
    if lower is None and not (image.mode.startswith("I") or image.mode == "F"):
        return None
    # Pillow itself scales the values of plain PGM from the maximum in the header to 16 bits.
    stated = depth_span(16) if codec == "ppm_plain" else _stated(image, data)
    turn(image)
    if lower is None:
        deep = DeepPixels(image.width, image.height, lambda box: np.asarray(image.crop(box)), stated)
    else:
        turn(lower)
        low = lower

        def read(box: tuple[int, int, int, int]) -> NDArray[Any]:
            upper = np.asarray(image.crop(box)).astype(np.uint16)
            values: NDArray[np.uint16] = (upper << 8) | np.asarray(low.crop(box))
            return values

        deep = DeepPixels(image.width, image.height, read, stated)
    if image.format == "PNG" and stated is not None and _is_scaled(deep, stated):
        return DeepPixels(deep.width, deep.height, deep.read, depth_span(16))
    return deep


def _open_lower(image: Image.Image, data: bytes) -> Image.Image | None:
    """Opens the file once more, so that its pixels are the lower bytes, because Pillow has no 16-bit colour."""
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PLANAR, 1) != 1:
        return None
    lower = Image.open(io.BytesIO(data), formats=FORMATS)
    assert isinstance(lower, ImageFile.ImageFile)
    tiles: list[Any] = []
    for tile in lower.tile:
        mode, *rest = [tile.args] if isinstance(tile.args, str) else (tile.args or [None])
        if mode not in _LOWER:
            return None
        args = (_LOWER[mode], *rest) if rest else _LOWER[mode]
        tiles.append(tile._replace(args=args))
    lower.tile = tiles
    return lower


def _codec(image: Image.Image) -> str | None:
    return image.tile[0].codec_name if isinstance(image, ImageFile.ImageFile) and image.tile else None


def _greatest(image: Image.Image) -> int:
    """Returns the value of white in a PGM or PPM, from its header."""
    assert isinstance(image, ImageFile.ImageFile)
    args = image.tile[0].args
    return int(args[-1]) if args else 255


def _read_pnm(image: Image.Image, data: bytes) -> DeepPixels:
    """Reads binary PGM and PPM with any maximum. Pillow would read them value by value, in Python."""
    assert isinstance(image, ImageFile.ImageFile)
    start, channels, most = image.tile[0].offset, len(image.getbands()), _greatest(image)
    kind = ">u1" if most < 256 else ">u2"
    count = image.width * image.height * channels
    there = (len(data) - start) // np.dtype(kind).itemsize
    if there < count:
        raise OSError(f"image file is truncated ({there} of {count} values)")
    shape = (image.height, image.width) if channels == 1 else (image.height, image.width, channels)
    pixels = np.frombuffer(data, kind, offset=start, count=count).reshape(shape)
    stated = None if most == 65535 else Span(0.0, float(most))
    return DeepPixels(
        image.width, image.height, lambda box: pixels[box[1] : box[3], box[0] : box[2]].astype(np.uint16), stated
    )


def _stated(image: Image.Image, data: bytes) -> Span | None:
    """Reads the depth that a PNG states in sBIT, or a TIFF in its tags; None if it states none.

    A stated maximum below that of the file's 16 bits is rounded up to a depth of BITS, because many writers store the
    maximum of the photo there.
    """
    if image.format == "PNG":
        bits = _significant_bits(data)
        return None if bits is None else depth_span(min((known for known in BITS if known >= bits), default=16))
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.mode != "F":
        sample = _numbers(image.tag_v2.get(_BITS_PER_SAMPLE))
        if sample and 8 < max(sample) < 16:
            return depth_span(int(max(sample)))
        for tag in _WHITE_TAGS:
            values = _numbers(image.tag_v2.get(tag))
            if values and 0 < max(values) < 65535:
                return depth_span(next(bits for bits in BITS if max(values) < 2**bits))
    return None


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [float(item) for item in values if isinstance(item, (int, float)) and item == item]


def _significant_bits(data: bytes) -> int | None:
    """Returns the largest number of bits of a colour in the sBIT chunk of a PNG; None without a valid one."""
    place = 8
    while place + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        if kind == b"IDAT" or not re.fullmatch(rb"[A-Za-z]{4}", kind):
            return None
        if kind == b"sBIT":
            bits = max(data[place + 8 : place + 8 + min(length, 3)], default=0)
            return bits if 0 < bits <= 16 else None
        place += 12 + length
    return None


def _is_scaled(deep: DeepPixels, stated: Span) -> bool:
    """Whether the values of a PNG are scaled to 16 bits, as the standard requires, despite the depth in sBIT.

    If so, some are larger than that depth allows, or the lower bits of all are zero or repeat the upper ones.
    """
    bits = stated.bits or 16
    if bits == 16:
        return True
    padded = True
    for _, values in deep._pieces():
        colours = (values[..., :3] if values.ndim == 3 else values).astype(np.uint32)
        if colours.max(initial=0) > stated.high:
            return True
        upper = colours >> (16 - bits)
        repeated = (upper << (16 - bits)) | (upper >> max(0, 2 * bits - 16))
        padded = padded and bool(((colours == upper << (16 - bits)) | (colours == repeated)).all())
    return padded and deep.extremes().high > 0


def _table(span: Span) -> NDArray[np.uint8]:
    """Returns the 8-bit value of each 16-bit value, [65536]."""
    return _scale(np.arange(65536), span)


def _scale(values: NDArray[Any], span: Span) -> NDArray[np.uint8]:
    """Scales values to 8 bits. NaN and infinities become black."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        known = np.nan_to_num(values.astype(np.float64), nan=span.low, posinf=span.low, neginf=span.low)
    scaled = (known - span.low) * (255 / max(span.high - span.low, 1e-12))
    result: NDArray[np.uint8] = np.rint(scaled.clip(0, 255)).astype(np.uint8)
    return result
