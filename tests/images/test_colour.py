"""Photos whose colours are meant by a profile of their own."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.images import decode_image
from tests.images.hostile import encode

D50 = (0.9642, 1.0, 0.8249)
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
DISPLAY_P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
ADOBE_RGB = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])
GAMMA = 2.2
"""Colorants at D50, column by column."""


def profile(colorants: np.ndarray, name: bytes = b"wide") -> bytes:
    """An ICC profile (version 2) of a display: three colorants and one gamma."""

    def xyz(values: object) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))  # type: ignore[attr-defined]

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(GAMMA * 256))
    description = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + bytes(79)
    parts = {b"desc": description, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(D50)}
    parts |= {kind: xyz(column) for kind, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants.T, strict=True)}
    parts |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    place, table, body = 128 + 4 + 12 * len(parts), struct.pack(">I", len(parts)), b""
    for kind, data in parts.items():
        table += struct.pack(">4sII", kind, place + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(
        ">I4sI4s4s4s", 128 + len(table) + len(body), b"\0\0\0\0", 0x02400000, b"mntr", b"RGB ", b"XYZ "
    )
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", *(round(value * 65536) for value in D50))
    return header.ljust(128, b"\0") + table + body


def in_srgb(colour: tuple[int, int, int], colorants: np.ndarray) -> np.ndarray:
    """By the standards' formulas."""
    linear = np.linalg.solve(SRGB, colorants @ (np.array(colour) / 255) ** GAMMA).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(encoded * 255)


def decode(data: bytes) -> list[int]:
    pixels = decode_image(data, size=(8, 8), interpolation="bicubic", max_pixels=1000).pixels
    return [int(value) for value in pixels[4, 4]]


@pytest.mark.parametrize("colorants", [DISPLAY_P3, ADOBE_RGB], ids=["display-p3", "adobe-rgb"])
@pytest.mark.parametrize("colour", [(180, 90, 60), (90, 160, 110), (128, 128, 128)])
def test_wide_colours_become_those_of_srgb(colorants: np.ndarray, colour: tuple[int, int, int]) -> None:
    for kind in ("PNG", "TIFF"):
        data = encode(Image.new("RGB", (20, 10), colour), kind, icc_profile=profile(colorants))
        np.testing.assert_allclose(decode(data), in_srgb(colour, colorants), atol=2)


def test_srgb_and_broken_profiles_change_nothing() -> None:
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for known in (own, profile(ADOBE_RGB)[:200], b"no profile", profile(ADOBE_RGB, b"sRGB by name")):
        assert decode(encode(Image.new("RGB", (20, 10), (180, 90, 60)), "PNG", icc_profile=known)) == [180, 90, 60]
