"""Photos whose colours are meant by a profile of their own."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import product

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
    """An ICC profile of a display: three colorants and one gamma."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(GAMMA * 256))
    parts = {kind: xyz(column) for kind, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants.T, strict=True)}
    parts |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    return pack_profile(b"mntr", b"RGB ", b"XYZ ", parts, name)


def xyz(values: Iterable[float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def pack_profile(kind: bytes, space: bytes, connection: bytes, parts: dict[bytes, bytes], name: bytes) -> bytes:
    """An ICC profile of version 2."""
    description = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + bytes(79)
    parts = {b"desc": description, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(D50), **parts}
    place, table, body = 128 + 4 + 12 * len(parts), struct.pack(">I", len(parts)), b""
    for key, data in parts.items():
        table += struct.pack(">4sII", key, place + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02400000, kind, space, connection)
    header += bytes(12) + b"acsp" + bytes(28) + xyz(D50)[8:]
    return header.ljust(128, b"\0") + table + body


INKS = np.array(
    [
        [(1 - k) * (100 - 45 * c - 30 * m - 8 * y), (1 - k) * (50 * m - 30 * c), (1 - k) * (60 * y - 30 * c)]
        for c, m, y, k in product((0, 1), repeat=4)
    ]
)
"""Lab of what a press prints of each full ink and overprint, c, m, y, k in the order of counting."""


def press() -> bytes:
    """An ICC profile of a press: a table of the 16 overprints, between which Lab is linear."""
    lab = INKS * (652.8, 256, 256) + (0, 32768, 32768)
    line = struct.pack(">2H", 0, 65535)
    table = struct.pack(">4sI4B9i2H", b"mft2", 0, 4, 3, 2, 0, *(np.eye(3, dtype=int).ravel() << 16), 2, 2)
    table += line * 4 + lab.round().astype(">u2").tobytes() + line * 3
    return pack_profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table}, b"press")


FORMATS: list[tuple[str, dict[str, object]]] = [("TIFF", {}), ("JPEG", {"quality": 100, "subsampling": 0})]


def lab_in_srgb(lab: np.ndarray) -> np.ndarray:
    """By the standards' formulas."""
    middle = (lab[0] + 16) / 116
    roots = np.array([middle + lab[1] / 500, middle, middle - lab[2] / 200])
    light = np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29)) * D50
    return encode_srgb(np.linalg.solve(SRGB, light))


def in_srgb(colour: tuple[int, int, int], colorants: np.ndarray) -> np.ndarray:
    """By the standards' formulas."""
    return encode_srgb(np.linalg.solve(SRGB, colorants @ (np.array(colour) / 255) ** GAMMA))


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
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


@pytest.mark.parametrize(
    ("inks", "lab"),
    [((0, 0, 0, 0), INKS[0]), ((0, 255, 0, 0), INKS[4]), ((255, 0, 255, 0), INKS[10]), ((0, 0, 0, 102), [60, 0, 0])],
    ids=["paper", "magenta", "green", "grey"],
)
def test_inks_become_what_their_press_prints(inks: tuple[int, ...], lab: list[float]) -> None:
    """Without a profile magenta is (255, 0, 255); on this press it is Lab (70, 50, 0). 102 of 255 are 40 %
    black, which leaves L = 60."""
    photo, expected = Image.new("CMYK", (20, 10), inks), lab_in_srgb(np.array(lab))
    for kind, options in FORMATS:
        np.testing.assert_allclose(decode(encode(photo, kind, icc_profile=press(), **options)), expected, atol=3)
        if sum(inks):
            assert np.abs(decode(encode(photo, kind, **options)) - expected).max() > 8


def test_srgb_and_broken_profiles_change_nothing() -> None:
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for known in (own, profile(ADOBE_RGB)[:200], b"no profile", profile(ADOBE_RGB, b"sRGB by name")):
        assert decode(encode(Image.new("RGB", (20, 10), (180, 90, 60)), "PNG", icc_profile=known)) == [180, 90, 60]
