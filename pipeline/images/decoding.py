"""Decodes bytes to pixels of the model's size. For any bytes, the result is pixels or an ImageError."""

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
from pipeline.images.codecs import decode_upright
from pipeline.images.colour import choose_transform
from pipeline.images.depth import Extremes, Span, choose_span, read_deep, states_depth
from pipeline.images.formats import FORMATS, explain_unknown
from pipeline.images.resizing import INTERPOLATIONS, resize, to_image, view_pixels
from pipeline.tiling import Tiling, plan_strip, plan_tiling
from schemas.tables import ErrorType

_TRUNCATION_WORDS = ("truncated", "not enough", "broken data stream", "unexpected end", "incomplete", "read length")
_MOST_TILES = 1024

_DRAFT_MARGIN = 2
"""A JPEG is decoded at 1/2, 1/4 or 1/8 of its size, as long as its sides stay this many times the wanted ones.

Measured with alfa-tiny against full decoding, the scores of 59 photos of 1500 x 1000 moved by 0.010 at most (0.0007 on
average), those of the demo's images enlarged to 12 megapixels by 0.003; with a margin of 1 by 0.011 (0.0015) and 0.002.
"""

_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""

# An image is kept in one piece, so that view_pixels need not copy it; the default is pieces of 16 MB.
_imaging.set_block_size(1 << 30)
# max_pixels is checked before decoding instead; Pillow's own limit is global, so a job could not raise it.
Image.MAX_IMAGE_PIXELS = None
# The row of an image says what is wrong with it; the warnings of decoders would not even name the file.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(OSError, AttributeError):
    _decoders = ctypes.CDLL(_imaging.__file__)  # it is linked with libtiff, so its handlers can be looked up here
    _decoders.TIFFSetErrorHandler(None)
    _decoders.TIFFSetWarningHandler(None)


class ImageError(Exception):
    """An image has no usable pixels. error_type: one of ErrorType; message: the reason, for a person."""

    def __init__(self, error_type: ErrorType, message: str) -> None:
        super().__init__(error_type, message)
        self.error_type = error_type
        self.message = message


@dataclass(frozen=True)
class Decoded:
    """A decoded image.

    pixels: uint8 [height, width, 3], RGB, of the model's size. source_width, source_height: in pixels after EXIF
    orientation. tiles, tiling: None without tiles; else tiles [T, height, width, 3], each of the model's size, at the
    places of tiling. bit_depth: bits of a channel from black to white; None for fractions. clipped: number of pixels
    beyond that. frames: number of frames or pages of the file; None if they cannot be counted.
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
    """How tiles are cut. patches: rows and columns of patches of a tile; size, overlap: in pixels of the photo.

    size: None cuts strips only, see plan_strip; other photos stay whole.
    """

    patches: tuple[int, int]
    size: int | None = None
    overlap: int = 0

    def plan(self, width: int, height: int, view: int) -> Tiling | None:
        """Where the tiles of a photo lie; None where it stays whole. view: pixels a side that the model sees."""
        if self.size is None:
            return plan_strip(width, height, self.patches, view)
        return plan_tiling(width, height, self.patches, self.size, self.overlap)


def decode_image(
    data: bytes,
    *,
    size: tuple[int, int],
    interpolation: str,
    max_pixels: int,
    cut: Cut | None = None,
    span: Span | None = None,
) -> Decoded:
    """Decodes an image, squashes it to size (height, width), as the model's pre-processing does, and cuts its tiles.

    Any format of FORMATS is read; of several frames or pages the first. EXIF orientation is applied, and transparency
    is put on white. A large JPEG is decoded at a reduced size, unless its tiles have a size of their own. Waits while
    other threads use up the budget of pixels.

    cut: how to cut tiles; None: no tiles. span: the values that become black and white in a photo of more than 8 bits,
    unless the file states them; default: a span that fits this photo. Raises ImageError, and no other error for any
    bytes.
    """
    with _opened(data, max_pixels, max(size) if cut is None or cut.size is None else None) as (image, stored):
        frames = _count_frames(image, data)
        return replace(_fit(image, data, stored, size, interpolation, cut, span), frames=frames)


def fit_image(
    image: Image.Image,
    *,
    size: tuple[int, int],
    interpolation: str,
    max_pixels: int,
    cut: Cut | None = None,
    span: Span | None = None,
) -> Decoded:
    """Does what decode_image does for an image in memory, which is not changed.

    Raises ImageError where it has more than max_pixels, or too many tiles.
    """
    _require_fewer_pixels(image, max_pixels)
    with PIXELS.hold(image.width * image.height):
        return _fit(image.copy(), b"", image.size, size, interpolation, cut, span)


def _count_frames(image: Image.Image, data: bytes) -> int | None:
    """Counts frames or pages; None if they cannot be counted. To count those of a TIFF or GIF, Pillow moves through the
    file, so it is opened once more."""
    if image.format not in ("TIFF", "GIF"):
        return getattr(image, "n_frames", 1)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as again:
            return getattr(again, "n_frames", 1)
    except MemoryError:
        raise
    except Exception:  # a later page is broken, but the first may be fine
        return None


def measure_image(data: bytes, *, max_pixels: int) -> Extremes | None:
    """Measures the extreme values of a photo of more than 8 bits that does not say its depth; None for other photos.

    Raises ImageError as decode_image does.
    """
    with _opened(data, max_pixels, None) as (image, _):
        deep = None if states_depth(image, data) else read_deep(image, data, _turn_upright)
        return None if deep is None else deep.extremes()


def measure_loaded(image: Image.Image) -> Extremes | None:
    """As measure_image, of an image that a caller has in memory already; it is left as it is."""
    deep = read_deep(image.copy(), b"", _turn_upright)
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
    """Makes the model's view of an image, which may be changed. stored: its width and height in the file."""
    bits: int | None
    transform = choose_transform(image)
    deep = read_deep(image, data, _turn_upright)
    if deep is None:
        bits, clipped = 8, 0
        pixels = decode_upright(image, data)
        width, height = reversed(stored) if pixels is None and _turn_upright(image) else stored
    else:
        width, height = deep.width, deep.height
        span = deep.stated or span or choose_span([deep.extremes()])
        (image, clipped), bits, pixels = deep.render(span), span.bits, None
    upright = None
    if pixels is None:
        upright = image if transform is not None and image.mode == "CMYK" else _to_rgb(image)
        pixels = view_pixels(upright)
    mode = "RGB" if upright is None else upright.mode

    def convert(seen: Image.Image) -> Image.Image:
        return seen if transform is None else ImageCms.applyTransform(seen, transform) or seen

    squashed = resize(pixels, size, interpolation)
    if transform is not None:  # colours are converted afterwards, on fewer pixels
        squashed = np.asarray(convert(to_image(squashed, mode)))
    tiling = None if cut is None else cut.plan(width, height, max(size))
    tiles = None
    if tiling is not None:
        whole = to_image(pixels, mode) if upright is None else upright
        how = INTERPOLATIONS[interpolation]
        tiles = _cut(whole, tiling, size, lambda box: convert(whole.resize((size[1], size[0]), how, box=box)))
    return Decoded(np.ascontiguousarray(squashed[..., :3]), width, height, tiles, tiling, bits, clipped)


def _require_fewer_pixels(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        message = f"{image.width} x {image.height} pixels are more than dataset.max_pixels ({max_pixels})"
        raise ImageError(ErrorType.TOO_MANY_PIXELS, message)


def decode_thumbnail(data: bytes, *, longest: int, max_pixels: int, span: Span | None = None) -> bytes:
    """Makes an upright JPEG thumbnail, whose longer side has at most `longest` pixels.

    It is for people only: large JPEGs are decoded at a reduced size. span: as decode_image takes it. Raises ImageError
    as decode_image does.
    """
    with _opened(data, max_pixels, longest) as (image, _):
        deep = read_deep(image, data, _turn_upright)
        if deep is None:
            _turn_upright(image)
            small = _to_rgb(image)
        else:
            small = _to_rgb(deep.render(deep.stated or span or choose_span([deep.extremes()]))[0])
        small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=80, optimize=True)
        return buffer.getvalue()


def _cut(
    image: Image.Image, tiling: Tiling, size: tuple[int, int], view: Callable[[Any], Image.Image]
) -> NDArray[np.uint8]:
    if len(tiling.places) > _MOST_TILES:
        message = (
            f"{image.width} x {image.height} pixels make {len(tiling.places)} tiles, more than {_MOST_TILES}; "
            "method.tile.size is too small for it"
        )
        raise ImageError(ErrorType.TOO_MANY_PIXELS, message)
    tiles = np.empty((len(tiling.places), *size, 3), dtype=np.uint8)
    for tile, box in zip(tiles, tiling.boxes(image.width, image.height), strict=True):
        tile[:] = np.asarray(view(box))
    return tiles


def decode_mask(data: bytes) -> NDArray[np.bool_]:
    """Decodes a ground truth mask to bool [height, width].

    Pixels above 0 are anomalous (VisA's masks hold class ids).
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        values = np.asarray(image)
    return values.max(axis=2) > 0 if values.ndim == 3 else values > 0


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int, wanted: int | None) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """Opens an image without decoding its pixels. Yields it, and its stored width and height.

    Its pixels are counted in PIXELS until the block ends, and errors of decoding become ImageError. wanted: the longer
    side that is needed; large JPEGs are then decoded at a reduced size.
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
                    image.close()  # frees the pixels before the budget is released
                    if image.format == "JPEG2000":
                        trim_small_blocks()
    except ImageError:
        raise
    except Exception as error:  # decoders raise all kinds of errors for broken files
        raise _classify(error, data) from None


def _turn_upright(image: Image.Image) -> bool:
    """Loads an image and applies its EXIF orientation. Returns whether width and height were swapped.

    Broken EXIF is ignored, as viewers do.
    """
    image.load()
    sideways = False
    try:
        sideways = image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # Pillow may raise any error for broken EXIF, after it has rotated the pixels
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
        return ImageError(ErrorType.INTERNAL, "there was no memory left to decode it; the file may be fine")
    if isinstance(error, EOFError) or any(word in text.lower() for word in _TRUNCATION_WORDS):
        return ImageError(ErrorType.TRUNCATED, f"the file ends too early ({text})")
    return ImageError(ErrorType.CORRUPT, f"the file is damaged ({text})")
