"""Measures the time to decode a large JPEG to the model's size: decode_image against full decoding and resizing.

One thread is used, runs interleave, and medians are compared. The photo is one of the demo's, enlarged and with sensor
noise, so that it has as many bytes as a real photo.
"""

from __future__ import annotations

import argparse
import functools
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipeline.images import Decoded, decode_image, give_back_freed_memory
from tests.bench.measuring import measure, print_table, write_results

PHOTO = Path(__file__).parents[2] / "infra/demo/images/hazelnut/test/good/00.jpg"
SIZES = ((4000, 3000), (1500, 1000))
NOISE = 4.0
"""Standard deviation, of 255."""


def make_jpeg(width: int, height: int, progressive: bool) -> bytes:
    enlarged = np.asarray(Image.open(PHOTO).resize((width, height), Image.Resampling.BICUBIC))
    noise = np.random.default_rng(0).normal(0, NOISE, enlarged.shape)
    buffer = io.BytesIO()
    noisy = Image.fromarray((enlarged + noise).clip(0, 255).astype(np.uint8))
    noisy.save(buffer, "JPEG", quality=90, progressive=progressive)
    return buffer.getvalue()


def decode_in_full(data: bytes, side: int) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    ImageOps.exif_transpose(image, in_place=True)
    return image.resize((side, side), Image.Resampling.BICUBIC)


def decode_reduced(data: bytes, side: int) -> Decoded:
    return decode_image(data, size=(side, side), interpolation="bicubic", max_pixels=100_000_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=240, help="pixels of a side of the model's input")
    parser.add_argument("--repetitions", type=int, default=15)
    options = parser.parse_args()
    give_back_freed_memory()  # as a scoring actor does
    runs: dict[str, Callable[[], object]] = {}
    photos = [
        (f"{width} x {height}, {kind}", make_jpeg(width, height, kind == "progressive"))
        for width, height in SIZES
        for kind in ("baseline", "progressive")
    ]
    for name, data in photos:
        runs[f"{name}, in full"] = functools.partial(decode_in_full, data, options.side)
        runs[f"{name}, decode_image"] = functools.partial(decode_reduced, data, options.side)
    seconds = measure(runs, options.repetitions)
    rows = []
    for name, data in photos:
        full, reduced = (seconds[f"{name}, {way}"] for way in ("in full", "decode_image"))
        rows.append(
            (name, f"{len(data) / 1e6:.2f}", f"{full * 1e3:.1f}", f"{reduced * 1e3:.1f}", f"{full / reduced:.2f}")
        )
    columns = ("JPEG", "MB", "full, ms", "decode_image, ms", "ratio")
    print_table(f"bytes to {options.side} x {options.side} pixels, one thread", columns, rows)
    write_results("decoding", {"side": options.side, "seconds": seconds})


if __name__ == "__main__":
    main()
