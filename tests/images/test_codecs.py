"""simplejpeg, imagecodecs and Pillow give the same pixels."""

import contextlib
import io
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.images import ImageError, codecs, decode_image
from tests.images.hostile import encode, hostile_files, png_chunk

PHOTO = Image.radial_gradient("L").resize((399, 320))
COLOURS = Image.merge("RGB", [PHOTO, PHOTO.rotate(90).resize(PHOTO.size), Image.effect_noise(PHOTO.size, 60)])
OPTIONS: dict[str, Any] = {"size": (16, 24), "interpolation": "bicubic", "max_pixels": 399 * 320}


@contextlib.contextmanager
def pillow_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(codecs, "simplejpeg", None)
        patch.setattr(codecs, "imagecodecs", None)
        yield


def decode_without(data: bytes, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """Decodes by Pillow alone."""
    with pillow_alone(monkeypatch):
        return decode_image(data, **{**OPTIONS, **options})


def is_fast(data: bytes) -> bool:
    """Whether a photo is decoded by one of the fast libraries."""
    with Image.open(io.BytesIO(data)) as opened:
        return codecs.decode_upright(opened, data) is not None


@pytest.mark.parametrize("size", [(16, 24), (60, 90), (300, 399)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 5}])
def test_both_decoders_give_the_same_pixels(
    how: dict[str, Any], mode: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded at an eighth, at a half and in full."""
    data = encode(COLOURS.convert(mode), "JPEG", **how)
    assert is_fast(data)
    fast, plain = decode_image(data, **{**OPTIONS, "size": size}), decode_without(data, monkeypatch, size=size)
    np.testing.assert_array_equal(fast.pixels, plain.pixels)
    assert (fast.source_width, fast.source_height) == (plain.source_width, plain.source_height) == (399, 320)


@pytest.mark.parametrize("left", [0.3, 0.9, 0.999])
def test_a_truncated_jpeg_is_refused_with_the_same_words(left: float, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(COLOURS, "JPEG")
    messages = []
    for decode in (lambda data: decode_image(data, **OPTIONS), lambda data: decode_without(data, monkeypatch)):
        with pytest.raises(ImageError) as caught:
            decode(data[: int(left * len(data))])
        messages.append((caught.value.error_type, caught.value.message))
    assert messages[0] == messages[1]


def test_bytes_behind_the_end_and_inside_the_photo_are_no_reason_to_refuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some cameras leave zeros or a second photo behind the first."""
    data = encode(COLOURS, "JPEG")
    expected = decode_image(data, **OPTIONS).pixels
    for more in (b"\0" * 500, data):
        np.testing.assert_array_equal(decode_image(data + more, **OPTIONS).pixels, expected)
        np.testing.assert_array_equal(decode_without(data + more, monkeypatch).pixels, expected)


def with_chunks(png: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG with more chunks before and after its pixels."""
    first, end = png.index(b"IDAT") - 4, png.index(b"IEND") - 4
    return png[:first] + before + png[first:end] + after + png[end:]


def saved_as_png(mode: str = "RGB", **how: Any) -> bytes:
    return encode(COLOURS.convert(mode), "PNG", **how)


GAMMA = png_chunk(b"gAMA", struct.pack(">I", 100_000))
TURNED = Image.Exif()
TURNED[0x0112] = 6
EXIF = png_chunk(b"eXIf", TURNED.tobytes()[6:])
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("size", [(16, 24), (320, 399)])
@pytest.mark.parametrize(
    "data",
    [
        saved_as_png(),
        saved_as_png("L"),
        saved_as_png(compress_level=0),
        saved_as_png(optimize=True),
        with_chunks(
            saved_as_png(), before=GAMMA + png_chunk(b"tEXt", b"Software\0camera"), after=png_chunk(b"tEXt", b"a\0b")
        ),
    ],
)
def test_plain_pngs_have_the_same_pixels_by_both(
    data: bytes, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_fast(data)
    fast, plain = decode_image(data, **{**OPTIONS, "size": size}), decode_without(data, monkeypatch, size=size)
    np.testing.assert_array_equal(fast.pixels, plain.pixels)
    assert (fast.source_width, fast.source_height) == (plain.source_width, plain.source_height) == (399, 320)


@pytest.mark.parametrize(
    ("data", "width"),
    [
        (saved_as_png("P"), 399),
        (saved_as_png("RGBA"), 399),
        (saved_as_png("I;16"), 399),
        (saved_as_png("1"), 399),
        (saved_as_png(transparency=(0, 0, 0)), 399),
        (saved_as_png(icc_profile=b"profile" * 9), 399),
        (saved_as_png(exif=TURNED), 320),
        (with_chunks(saved_as_png(), after=EXIF), 320),
        (with_chunks(saved_as_png(), after=png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)), 320),
        (with_chunks(saved_as_png(), before=png_chunk(b"tEXt", b"Raw profile type exif\0")), 399),
        (encode(COLOURS, "PNG", save_all=True, append_images=[COLOURS]), 399),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_pngs_that_may_look_otherwise_are_left_to_pillow(data: bytes, width: int) -> None:
    """Also those that say only after their pixels how they have to be turned."""
    assert not is_fast(data)
    assert decode_image(data, **OPTIONS).source_width == width


def test_hostile_files_have_the_same_pixels_or_error_by_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(data: bytes) -> object:
        try:
            found = decode_image(data, **OPTIONS)
        except ImageError as error:
            return error.error_type, error.message
        return found.pixels.tobytes(), found.source_width, found.source_height

    checked = 0
    for number, (name, data) in enumerate(hostile_files()):
        if name.endswith((".png", ".jpg")) and number % 16 == 0:
            checked += 1
            expected = outcome(data)
            with pillow_alone(monkeypatch):
                assert outcome(data) == expected, name
    assert checked > 80
