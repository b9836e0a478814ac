"""simplejpeg and Pillow give the same pixels."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.images import ImageError, decode_image, jpeg
from tests.images.hostile import encode

PHOTO = Image.radial_gradient("L").resize((399, 320))
COLOURS = Image.merge("RGB", [PHOTO, PHOTO.rotate(90).resize(PHOTO.size), Image.effect_noise(PHOTO.size, 60)])
OPTIONS: dict[str, Any] = {"size": (16, 24), "interpolation": "bicubic", "max_pixels": 399 * 320}


def decode_without(data: bytes, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """Decodes by Pillow alone."""
    with monkeypatch.context() as patch:
        patch.setattr(jpeg, "simplejpeg", None)
        return decode_image(data, **{**OPTIONS, **options})


@pytest.mark.parametrize("size", [(16, 24), (60, 90), (300, 399)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 5}])
def test_both_decoders_give_the_same_pixels(
    how: dict[str, Any], mode: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded at an eighth, at a half and in full."""
    data = encode(COLOURS.convert(mode), "JPEG", **how)
    with Image.open(io.BytesIO(data)) as opened:
        assert jpeg.decode_upright_jpeg(opened, data) is not None
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
