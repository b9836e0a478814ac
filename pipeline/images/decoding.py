"""Bytes -> pixels of the model's size. Whatever the bytes are, the outcome is pixels or an ImageError."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError, _imaging

from pipeline.images.budget import PIXELS, trim_small_blocks
from pipeline.images.colour import choose_transform
from pipeline.images.depth import Extremes, Span, choose_span, read_deep, states_depth
from pipeline.images.formats import FORMATS, explain_unknown
from pipeline.tiling import Tiling, plan_tiling
from schemas.tables import ErrorType

_TRUNCATION_WORDS = ("truncated", "not enough", "broken data stream", "unexpected end", "incomplete", "read length")
_INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


_MOST_TILES = 1024

_DRAFT_MARGIN = 2
"""A JPEG is decoded at 1/2, 1/4 or 1/8 of its sides while they stay this many times those that are wanted. Measured
with alfa-tiny against full decoding, the scores of 59 photos of 1500 x 1000 moved by 0.010 at most (0.0007 on average),
those of the demo's images enlarged to 12 megapixels by 0.003; with a margin of 1 by 0.011 (0.0015) and 0.002."""

_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that make a photo's width its height."""

# max_pixels is checked here, before a pixel is decoded; Pillow's own limit is global and cannot be raised by a job.
Image.MAX_IMAGE_PIXELS = None
# What is wrong with a file is said in its row; decoders would say it once more on stderr, without its name.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(OSError, AttributeError):
    _decoders = ctypes.CDLL(_imaging.__file__)  # a look-up in it finds libtiff, which it is linked with
    _decoders.TIFFSetErrorHandler(None)
    _decoders.TIFFSetWarningHandler(None)


class ImageError(Exception):
    """Why an image has no pixels: a type from the closed list, and a message for a person."""

    def __init__(self, error_type: ErrorType, message: str) -> None:
        super().__init__(error_type, message)
        self.error_type = error_type
        self.message = message


@dataclass(frozen=True)
class Decoded:
    """pixels: uint8 [height, width, 3], RGB, of the model's size; source size in pixels after EXIF orientation.

    Where tiles were asked for: tiles [T, height, width, 3], each of the model's size, at the places of tiling.
    bit_depth: bits of a channel that were taken as black to white; None of fractions. clipped: pixels beyond that.
    frames: how many frames or pages the file has, of which this is the first; None where that cannot be told.
    """

    pixels: NDArray[np.uint8]
    source_width: int
    source_height: int
    tiles: NDArray[np.uint8] | None = None
    tiling: Tiling | None = None
    bit_depth: int | None = 8
    clipped: int = 0
    frames: int | None = 1


@dataclass(frozen=True)
class Cut:
    """How tiles are cut: rows and columns of patches of one, its side and overlap in pixels of the photo."""

    patches: tuple[int, int]
    size: int
    overlap: int


def decode_image(
    data: bytes,
    *,
    size: tuple[int, int],
    interpolation: str,
    max_pixels: int,
    cut: Cut | None = None,
    span: Span | None = None,
) -> Decoded:
    """The whole image, squashed to size (height, width) as the model's pre-processing does, and its tiles if asked for.

    Of whatever format of FORMATS; of several frames or pages the first. EXIF orientation is applied; transparency is
    put on white. A large JPEG that is not cut is decoded at a reduced size. span: which values of a photo of more than
    8 bits become black and white, where it does not say so itself; default: what holds this one photo. Raises
    ImageError alone, whatever the bytes. Waits while other threads decode as much as memory is planned for.
    """
    with _opened(data, max_pixels, max(size) if cut is None else None) as (image, stored):
        frames = _count_frames(image, data)
        return replace(_fit(image, data, stored, size, interpolation, cut, span), frames=frames)


def fit_image(
    image: Image.Image, *, size: tuple[int, int], interpolation: str, max_pixels: int, cut: Cut | None = None
) -> Decoded:
    """As decode_image, of an image that a caller has in memory already; it is left as it is.

    Raises ImageError where it has more than max_pixels or its tiles are too many.
    """
    _require_fewer_pixels(image, max_pixels)
    with PIXELS.hold(image.width * image.height):
        return _fit(image.copy(), b"", image.size, size, interpolation, cut, None)


def _count_frames(image: Image.Image, data: bytes) -> int | None:
    """Frames or pages. Pillow walks through a TIFF or GIF to count them, so that is done on one opened anew."""
    if image.format not in ("TIFF", "GIF"):
        return getattr(image, "n_frames", 1)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as again:
            return getattr(again, "n_frames", 1)
    except MemoryError:
        raise
    except Exception:  # a later page is broken; the first may be in order
        return None


def measure_image(data: bytes, *, max_pixels: int) -> Extremes | None:
    """The extreme values of a photo of more than 8 bits that does not say its depth itself; None of any other.

    Raises ImageError as decode_image does.
    """
    with _opened(data, max_pixels, None) as (image, _):
        deep = None if states_depth(image, data) else read_deep(image, data, _turn_upright)
        return None if deep is None else deep.extremes()


def _fit(
    image: Image.Image,
    data: bytes,
    stored: tuple[int, int],
    size: tuple[int, int],
    interpolation: str,
    cut: Cut | None,
    span: Span | None,
) -> Decoded:
    """The model's view of an image, which is changed. stored: its width and height in the file."""
    bits: int | None
    transform = choose_transform(image)
    deep = read_deep(image, data, _turn_upright)
    if deep is None:
        width, height = reversed(stored) if _turn_upright(image) else stored
        shallow, bits, clipped = image, 8, 0
    else:
        width, height = deep.width, deep.height
        span = deep.stated or span or choose_span([deep.extremes()])
        (shallow, clipped), bits = deep.render(span), span.bits
    how = _INTERPOLATIONS[interpolation]
    upright = shallow if transform is not None and shallow.mode == "CMYK" else _to_rgb(shallow)

    def view(box: tuple[float, float, float, float] | None = None) -> Image.Image:
        seen = upright.resize((size[1], size[0]), how, box=box)  # small first: colours cost by the pixel
        return seen if transform is None else ImageCms.applyTransform(seen, transform) or seen

    squashed = view()
    tiles, tiling = (None, None) if cut is None else _cut(upright, cut, size, view)
    return Decoded(np.asarray(squashed), width, height, tiles, tiling, bits, clipped)


def _require_fewer_pixels(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        message = f"{image.width} x {image.height} pixels are more than dataset.max_pixels ({max_pixels})"
        raise ImageError(ErrorType.TOO_MANY_PIXELS, message)


def decode_thumbnail(data: bytes, *, longest: int, max_pixels: int) -> bytes:
    """The image as a small JPEG, its longer side `longest` pixels at most, upright and in its own proportions.

    For people's eyes alone: large JPEGs are decoded at a reduced size. Raises ImageError as decode_image does.
    """
    with _opened(data, max_pixels, longest) as (image, _):
        deep = read_deep(image, data, _turn_upright)
        if deep is None:
            _turn_upright(image)
            small = _to_rgb(image)
        else:
            small = _to_rgb(deep.render(deep.stated or choose_span([deep.extremes()]))[0])
        small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=80, optimize=True)
        return buffer.getvalue()


def _cut(
    image: Image.Image, cut: Cut, size: tuple[int, int], view: Callable[[Any], Image.Image]
) -> tuple[NDArray[np.uint8], Tiling]:
    tiling = plan_tiling(image.width, image.height, cut.patches, cut.size, cut.overlap)
    if len(tiling.places) > _MOST_TILES:
        message = (
            f"{image.width} x {image.height} pixels make {len(tiling.places)} tiles, more than {_MOST_TILES}; "
            f"method.tile.size {cut.size} is too small for it"
        )
        raise ImageError(ErrorType.TOO_MANY_PIXELS, message)
    tiles = np.empty((len(tiling.places), *size, 3), dtype=np.uint8)
    for tile, box in zip(tiles, tiling.boxes(image.width, image.height), strict=True):
        tile[:] = np.asarray(view(box))
    return tiles, tiling


def decode_mask(data: bytes) -> NDArray[np.bool_]:
    """Ground truth [height, width]: a pixel is anomalous where it is above 0 (VisA's masks hold class ids)."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        values = np.asarray(image)
    return values.max(axis=2) > 0 if values.ndim == 3 else values > 0


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int, wanted: int | None) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """An image before its pixels are decoded, and its stored width and height; its pixels are counted until the block
    ends, and what its decoding raises becomes an ImageError.

    wanted: the longer side of what its pixels will be squashed to; large JPEGs then come at a reduced size.
    """
    if not data:
        raise ImageError(ErrorType.EMPTY, "the file has no bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _require_fewer_pixels(image, max_pixels)
            stored, pixels = image.size, image.width * image.height
            if wanted is not None:
                image.draft("RGB", (_DRAFT_MARGIN * wanted, _DRAFT_MARGIN * wanted))
            # A progressive JPEG holds 2 bytes for each colour of its full size, however small it is decoded.
            with PIXELS.hold(pixels if image.size == stored else pixels // 2):
                try:
                    yield image, stored
                finally:
                    image.close()  # its pixels go while they are still counted
                    if image.format == "JPEG2000":
                        trim_small_blocks()
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever a broken file makes them stumble over
        raise _classify(error, data) from None


def _turn_upright(image: Image.Image) -> bool:
    """Decodes, and applies EXIF orientation; whether that made its width its height. Broken EXIF says nothing, as in
    any viewer, and costs no image."""
    image.load()
    sideways = False
    try:
        sideways = image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # the parser of EXIF raises whatever it stumbles over, after it has turned the pixels
        pass
    return sideways


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _classify(error: Exception, data: bytes) -> ImageError:
    text = f"{type(error).__name__}: {str(error)[:200]}"
    if isinstance(error, UnidentifiedImageError):
        return ImageError(*explain_unknown(data))
    if isinstance(error, MemoryError):
        return ImageError(ErrorType.INTERNAL, "there was no memory left to decode it; the file may be in order")
    if isinstance(error, EOFError) or any(word in text.lower() for word in _TRUNCATION_WORDS):
        return ImageError(ErrorType.TRUNCATED, f"the file ends too early ({text})")
    return ImageError(ErrorType.CORRUPT, f"the file is damaged ({text})")
