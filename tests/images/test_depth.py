"""Deep photos: one made from the same 8-bit picture must look like it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.images import Decoded, Extremes, Isolation, Span, choose_span, decode_image, measure_image
from pipeline.images.depth import depth_span
from tests.images.deep_files import as_lzw, as_png, as_pnm, as_tiff, deep
from tests.images.hostile import encode, grey_tags, tiff

HEIGHT, WIDTH = 16, 24
GREY = np.random.default_rng(5).integers(0, 250, (HEIGHT, WIDTH), dtype=np.uint16)
RGB = np.random.default_rng(6).integers(0, 250, (HEIGHT, WIDTH, 3), dtype=np.uint16)


def decode(data: bytes, span: Span | None = None) -> Decoded:
    return decode_image(data, size=(HEIGHT, WIDTH), interpolation="nearest", max_pixels=10_000, span=span)


FILES = [as_png, as_tiff, lambda pixels: as_tiff(pixels, ">"), as_pnm]


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("pixels", [GREY, RGB], ids=["grey", "rgb"])
@pytest.mark.parametrize("write", FILES, ids=["png", "tiff", "tiff-big-endian", "pnm"])
def test_a_deep_photo_looks_as_in_8_bits(write: object, pixels: NDArray[np.uint16], bits: int) -> None:
    decoded = decode(write(deep(pixels, bits)), depth_span(bits))  # type: ignore[operator]
    expected = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    np.testing.assert_allclose(decoded.pixels.astype(int), expected, atol=1)
    assert (decoded.bit_depth, decoded.clipped) == (bits, 0)
    # without a class to ask, the smallest depth that holds the photo
    assert decode(write(deep(pixels, bits))).bit_depth == bits  # type: ignore[operator]


def test_compressed_and_alpha_are_deep_too() -> None:
    np.testing.assert_allclose(decode(as_lzw(deep(GREY, 12)), depth_span(12)).pixels[..., 0], GREY, atol=1)
    for opaque in (4095, 65535):
        alpha = np.full((HEIGHT, WIDTH, 1), opaque, np.uint16)
        decoded = decode(as_png(np.concatenate([deep(RGB, 12), alpha], axis=2)), depth_span(12))
        np.testing.assert_allclose(decoded.pixels.astype(int), RGB, atol=1)
        assert (decoded.bit_depth, decoded.clipped) == (12, 0)


DARK = (GREY // 5, RGB // 5)
"""12 bits of them fit in 10."""


@pytest.mark.parametrize("pixels", DARK, ids=["grey", "rgb"])
def test_what_a_file_says_of_its_depth_counts_before_all_else(pixels: NDArray[np.uint16]) -> None:
    values, colours = deep(pixels, 12), 1 if pixels.ndim == 2 else 3
    files = [
        as_png(values, (b"sBIT", bytes([12] * colours))),
        as_tiff(values, t281=("H", [4095] * colours)),
        as_tiff(values, t281=("H", [3000] * colours)),  # the greatest of a brighter photo of this camera
        as_tiff(values, t50717=("I", [4095])),
        as_pnm(values, 4095),
    ]
    for data in files:
        for span in (None, depth_span(8), depth_span(16)):
            decoded = decode(data, span)
            np.testing.assert_allclose(decoded.pixels[..., -1], pixels if colours == 1 else pixels[..., 2], atol=1)
            assert (decoded.bit_depth, decoded.clipped) == (12, 0)
        assert measure_image(data, max_pixels=10_000) is None


def test_a_png_that_fills_16_bits_as_its_standard_says_is_not_brightened_by_its_sbit() -> None:
    twelve = deep(DARK[0], 12)
    for values in (twelve << 4, twelve << 4 | twelve >> 8):
        np.testing.assert_allclose(decode(as_png(values, (b"sBIT", b"\x0c"))).pixels[..., 0], DARK[0], atol=1)


def test_packed_12_bits_are_12_bits() -> None:
    values = deep(DARK[0], 12).reshape(-1, 2).astype(np.uint32)
    packed = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], axis=1)
    data = packed.astype(np.uint8).tobytes()
    decoded = decode(tiff(grey_tags(WIDTH, HEIGHT, len(data), t258=("H", [12])), data))
    np.testing.assert_allclose(decoded.pixels[..., 0], DARK[0], atol=1)
    assert decoded.bit_depth == 12


def test_what_lies_beyond_the_depth_is_white_and_counted() -> None:
    values = deep(GREY, 12)
    values[3, 4:9] = 5000
    decoded = decode(as_png(values), depth_span(12))
    assert decoded.clipped == 5 and (decoded.pixels[3, 4:9] == 255).all()


def floats(values: NDArray[np.float32]) -> bytes:
    return encode(Image.fromarray(values), "TIFF")


def test_fractions_have_the_span_of_their_class_not_their_own() -> None:
    bright, dark = (GREY / 250).astype(np.float32), (GREY / 1000).astype(np.float32)
    found = [measure_image(floats(values), max_pixels=10_000) for values in (bright, dark)]
    span = choose_span([extremes for extremes in found if extremes is not None])
    assert span == (0, 1)
    np.testing.assert_allclose(decode(floats(dark), span).pixels[..., 0], GREY * 255 / 1000, atol=1)
    assert decode(floats(dark), span).bit_depth is None
    odd = bright.copy()
    odd[0, :4] = np.nan, np.inf, -np.inf, 1.5
    decoded = decode(floats(odd), span)
    assert decoded.pixels[0, :4, 0].tolist() == [0, 0, 0, 255] and decoded.clipped == 3


@pytest.mark.parametrize(
    ("found", "span"),
    [
        ([Extremes(0, 255, True)], (0, 255)),
        ([Extremes(3, 200, True), Extremes(0, 700, True)], (0, 1023)),
        ([Extremes(0, 900, True), Extremes(17, 4095, True)], (0, 4095)),
        ([Extremes(0, 16_383, True)], (0, 16_383)),
        ([Extremes(0, 16_384, True)], (0, 65_535)),
        ([Extremes(0, 70_000, True)], (0, 70_000)),
        ([Extremes(-5, 200, True)], (-5, 200)),
        ([Extremes(0.2, 0.9, False)], (0, 1)),
        ([Extremes(0.4, 0.6, False)], (0.4, 0.6)),
        ([Extremes(0.0, 251.5, False)], (0, 255)),
        ([Extremes(0.0, 3900.5, False), Extremes(5.0, 9.0, False)], (0, 4095)),
        ([Extremes(12.25, 14.5, False)], (12.25, 14.5)),
    ],
)
def test_one_span_holds_all(found: list[Extremes], span: tuple[float, float]) -> None:
    assert choose_span(found) == span


def test_a_truncated_pnm_and_a_short_sbit_are_no_crash() -> None:
    from pipeline.images import ImageError
    from schemas.tables import ErrorType

    with pytest.raises(ImageError) as caught:
        decode(as_pnm(deep(RGB, 12), 4095)[:-1])
    assert caught.value.error_type is ErrorType.TRUNCATED
    for chunk in ((b"sBIT", b""), (b"sBIT", b"\x63"), (b"tEXt", b"a\0b")):
        assert decode(as_png(deep(GREY, 12), chunk)).bit_depth == 12


def test_a_process_of_its_own_decodes_deep_photos_alike() -> None:
    options = {"size": (HEIGHT, WIDTH), "interpolation": "nearest", "max_pixels": 10_000, "span": depth_span(14)}
    data = as_png(deep(RGB, 12))
    with Isolation() as isolated:
        alone, here = isolated.decode(data, **options), decode_image(data, **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(alone.pixels, here.pixels)
    assert (alone.bit_depth, alone.clipped) == (14, 0)
