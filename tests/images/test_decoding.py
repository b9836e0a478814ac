import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.images import (
    Decoded,
    ImageError,
    Span,
    decode_image,
    decode_mask,
    decode_thumbnail,
    decoding,
    formats,
)
from schemas.tables import ErrorType
from tests.images.hostile import grey_tags, tiff


def decode(data: bytes, size: tuple[int, int] = (8, 8), max_pixels: int = 1_000_000) -> Decoded:
    return decode_image(data, size=size, interpolation="bilinear", max_pixels=max_pixels)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(mode: str, colour: object, kind: str = "PNG", **options: object) -> bytes:
    return encode(Image.new(mode, (20, 10), colour), kind, **options)  # type: ignore[arg-type]


PALETTE = Image.new("P", (20, 10), 1)
PALETTE.putpalette([0, 0, 0, 200, 100, 50])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (flat("RGB", (200, 100, 50)), (200, 100, 50)),
        (flat("RGB", (200, 100, 50), "BMP"), (200, 100, 50)),
        (flat("RGB", (200, 100, 50), "TIFF"), (200, 100, 50)),
        (flat("RGB", (200, 100, 50), "WEBP", lossless=True), (200, 100, 50)),
        (flat("RGB", (200, 100, 50), "PPM"), (200, 100, 50)),
        (flat("RGB", (200, 100, 50), "JPEG2000"), (200, 100, 50)),
        (encode(PALETTE, "GIF"), (200, 100, 50)),
        (b"P2 20 10 100\n" + b"50 " * 200, (128, 128, 128)),
        (flat("L", 77), (77, 77, 77)),
        (flat("LA", (77, 255)), (77, 77, 77)),
        (flat("1", 1), (255, 255, 255)),
        (flat("1", 0), (0, 0, 0)),
        (flat("RGBA", (200, 100, 50, 255)), (200, 100, 50)),
        (flat("RGBA", (200, 100, 50, 0)), (255, 255, 255)),
        (encode(PALETTE, "PNG"), (200, 100, 50)),
        (encode(PALETTE, "PNG", transparency=1), (255, 255, 255)),
        (flat("I;16", 32768), (128, 128, 128)),
        (flat("I;16", 65535), (255, 255, 255)),
        (flat("I;16", 32768, "TIFF"), (128, 128, 128)),
    ],
)
def test_every_mode_becomes_rgb(data: bytes, expected: tuple[int, int, int]) -> None:
    decoded = decode(data)
    assert (decoded.source_width, decoded.source_height) == (20, 10)
    assert decoded.pixels.shape == (8, 8, 3) and decoded.pixels.dtype == np.uint8
    np.testing.assert_array_equal(decoded.pixels[4, 4], expected)


@pytest.mark.parametrize("kind", ["AVIF", "HEIF", "MPO"])
def test_formats_that_lose_a_little_are_read_too(kind: str) -> None:
    decoded = decode(flat("RGB", (200, 100, 50), kind))
    assert (decoded.source_width, decoded.source_height) == (20, 10)
    np.testing.assert_allclose(decoded.pixels[4, 4], (200, 100, 50), atol=6)


def test_heic_without_its_decoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without = tuple(name for name in formats.FORMATS if name != "HEIF")
    for module in (formats, decoding):
        monkeypatch.setattr(module, "FORMATS", without)
    with pytest.raises(ImageError, match=r"HEIF.*alfa-pipeline\[heic\]") as caught:
        decode(flat("RGB", (1, 2, 3), "HEIF"))
    assert caught.value.error_type is ErrorType.UNREADABLE


def test_cmyk_red_is_red() -> None:
    red = decode(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)).pixels[4, 4]
    assert red[0] > 200 and red[1] < 60 and red[2] < 60


def test_float_tiff_is_stretched() -> None:
    ramp = Image.fromarray(np.linspace(-3, 5, 64, dtype=np.float32).reshape(8, 8))
    pixels = decode(encode(ramp, "TIFF")).pixels
    assert (pixels[0, 0, 0], pixels[-1, -1, 0]) == (0, 255)


CORNER = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:4, :4] = 255  # the stored top left corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encode(Image.fromarray(pixels), "PNG", exif=exif), size=(4, 4))
    upright = (16, 8) if orientation <= 4 else (8, 16)
    assert (decoded.source_width, decoded.source_height) == upright
    bright = np.argwhere(decoded.pixels[..., 0] > 127)
    assert np.array_equal(decoded.pixels[CORNER[orientation]] > 127, [True] * 3) and len(bright) == 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_jpeg_is_as_if_it_were_decoded_in_full(orientation: int, mode: str) -> None:
    """399 x 320 pixels come to 8 x 16 by way of 50 x 40; no reduced size has the width and height of the photo."""
    pixels = np.asarray(Image.radial_gradient("L").resize((399, 320))).copy()
    pixels[:160, :200] = 255  # the stored top left corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Image.fromarray(pixels).convert("RGB").convert(mode)
    options = {"size": (16, 8), "interpolation": "bicubic", "max_pixels": 399 * 320}
    jpeg = decode_image(encode(photo, "JPEG", exif=exif, quality=95), **options)
    full = decode_image(encode(photo.convert("RGB"), "PNG", exif=exif), **options)
    assert (jpeg.source_width, jpeg.source_height) == ((399, 320) if orientation <= 4 else (320, 399))
    np.testing.assert_allclose(jpeg.pixels.astype(int), full.pixels.astype(int), atol=12)


def test_a_large_jpeg_is_counted_with_all_its_pixels_and_all_its_bytes() -> None:
    for progressive in (False, True):
        data = encode(NOISE.resize((512, 512)), "JPEG", progressive=progressive)
        assert decode(data, max_pixels=512 * 512).source_width == 512
        assert error_type(data, max_pixels=512 * 512 - 1) is ErrorType.TOO_MANY_PIXELS
        for share in (0.3, 0.6, 0.98):
            assert error_type(data[: int(share * len(data))]) is ErrorType.TRUNCATED


def test_the_whole_image_is_squashed_without_a_crop() -> None:
    pixels = np.zeros((10, 100, 3), dtype=np.uint8)
    pixels[:, :50] = 255
    decoded = decode(encode(Image.fromarray(pixels), "PNG"), size=(4, 4))
    np.testing.assert_array_equal(decoded.pixels[..., 0] > 127, [[True, True, False, False]] * 4)


def test_the_first_of_several_frames_counts() -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    for kind in ("TIFF", "WEBP", "GIF", "PNG", "MPO", "AVIF"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        np.testing.assert_allclose(decode(data).pixels[4, 4], (255, 0, 0), atol=6)
        assert decode(data).frames == 2 and decode(encode(frames[0], kind)).frames == 1


def test_a_stack_whose_second_page_is_broken_is_scored_by_its_first() -> None:
    data = tiff(grey_tags(8, 8, 64), bytes(64), following=2**31)
    assert decode(data).source_width == 8 and decode(data).frames is None


def error_type(data: bytes, max_pixels: int = 1_000_000) -> ErrorType:
    with pytest.raises(ImageError) as caught:
        decode(data, max_pixels=max_pixels)
    assert caught.value.message
    return caught.value.error_type


def bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_what_is_no_image_has_a_type() -> None:
    assert error_type(b"") is ErrorType.EMPTY
    assert error_type(b"not an image") is ErrorType.NOT_AN_IMAGE
    assert error_type(encode(Image.new("RGB", (9, 9)), "EPS")) is ErrorType.NOT_AN_IMAGE
    assert error_type(bomb(50_000, 50_000)) is ErrorType.TOO_MANY_PIXELS
    assert error_type(flat("RGB", 0), max_pixels=199) is ErrorType.TOO_MANY_PIXELS
    assert decode(flat("RGB", 0), max_pixels=200).source_width == 20


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "HEIF", "JPEG2000", "PPM"])
def test_a_file_cut_anywhere_is_an_error_or_pixels(kind: str) -> None:
    data = encode(NOISE, kind)
    types = set()
    for length in range(0, len(data), max(1, len(data) // 60)):
        try:
            decode(data[:length])
        except ImageError as error:
            types.add(error.error_type)
    assert ErrorType.EMPTY in types
    assert types & {ErrorType.TRUNCATED, ErrorType.CORRUPT}
    if kind in ("JPEG", "PNG", "BMP"):
        assert error_type(data[: len(data) // 2]) is ErrorType.TRUNCATED


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "HEIF", "JPEG2000", "PPM"]),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=20),
)
def test_flipped_bytes_are_an_error_or_pixels(kind: str, flips: list[tuple[int, int]]) -> None:
    data = bytearray(encode(NOISE.resize((16, 16)), kind))
    for place, value in flips:
        data[place % len(data)] = value
    try:
        assert decode(bytes(data)).pixels.shape == (8, 8, 3)
    except ImageError as error:
        assert error.message


def test_masks_are_anomalous_above_zero() -> None:
    mask = np.zeros((2, 3), dtype=np.uint8)
    mask[0, 1], mask[1, 2] = 1, 255
    np.testing.assert_array_equal(decode_mask(encode(Image.fromarray(mask), "PNG")), mask > 0)


def test_a_thumbnail_is_small_upright_and_in_proportion() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    photo = Image.new("RGB", (1200, 600), (0, 0, 255))
    photo.paste((255, 0, 0), (0, 0, 600, 600))
    data = encode(photo, "JPEG", exif=exif, quality=95)
    small = Image.open(io.BytesIO(decode_thumbnail(data, longest=100, max_pixels=1_000_000)))
    assert small.format == "JPEG" and small.size == (50, 100)
    top, bottom = (np.asarray(small)[row, 25].astype(int) for row in (10, 90))
    assert top[0] > 200 > 60 > top[2] and bottom[2] > 200 > 60 > bottom[0]


def test_a_thumbnail_of_a_deep_photo_is_as_bright_as_its_class() -> None:
    dark = encode(Image.fromarray(np.full((40, 40), 1000, np.uint16)), "PNG")
    for span, value in ((None, 249), (Span(0, 4095), 62)):  # alone, 1000 of 1023
        small = Image.open(io.BytesIO(decode_thumbnail(dark, longest=20, max_pixels=10_000, span=span)))
        assert small.getpixel((9, 9)) == pytest.approx((value,) * 3, abs=2)


def test_a_thumbnail_of_what_is_no_image_or_too_large_is_an_error() -> None:
    for data, kind in ((b"text", ErrorType.NOT_AN_IMAGE), (flat("L", 1), ErrorType.TOO_MANY_PIXELS)):
        with pytest.raises(ImageError) as caught:
            decode_thumbnail(data, longest=10, max_pixels=100)
        assert caught.value.error_type == kind
