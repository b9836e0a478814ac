"""Measures the time to write the mask of a scored image: write_mask against a plain version with SciPy and Pillow.

One thread writes to memory, runs interleave, and medians are compared. The plain version upsamples, thresholds, calls
ndimage.label, computes boxes, areas and peaks, and writes the PNG with Pillow; it does not name defects.
"""

from __future__ import annotations

import argparse
import functools
import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from pipeline.images import give_back_freed_memory
from pipeline.scoring import Thresholds
from pipeline.scoring.scorer import Row, write_mask
from pipeline.storage import Run, Store
from schemas.job import parse_job
from tests.bench.measuring import measure, print_table, write_results

THRESHOLD = 0.5
PATCHES = 15
DEFECTS = ("scratch", "dent", "crack")


def make_grids() -> dict[str, NDArray[np.float32]]:
    """Maps of PATCHES x PATCHES, by what their masks show."""
    nothing = np.random.default_rng(0).random((PATCHES, PATCHES), dtype=np.float32) * 0.2
    grids = {name: nothing.copy() for name in ("nothing", "one blob", "ten blobs", "half of the image")}
    grids["one blob"][7, 7] = 0.9
    grids["ten blobs"][1:13:5, 1:15:4] = 0.9
    grids["ten blobs"][1, 1:9:4] = 0.1
    grids["half of the image"][:7] = 0.9
    return grids


def mark_plainly(grid: NDArray[np.float32], width: int, height: int) -> bytes:
    anomaly_map = np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR))
    mask = anomaly_map >= THRESHOLD
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[box] == number
        inside.sum(), anomaly_map[box][inside].max()
    buffer = io.BytesIO()
    Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def make_row(grid: NDArray[np.float32], width: int, height: int) -> Row:
    defects = np.random.default_rng(1).random((len(DEFECTS), *grid.shape), dtype=np.float32)
    return {
        "class_name": "part",
        "image_key": "part/a.jpg",
        "width": width,
        "height": height,
        "score": 0.9,
        "grid": grid.ravel(),
        "grid_width": grid.shape[1],
        "defect_names": list(DEFECTS),
        "defect_grid": defects.ravel(),
        "defect_grid_width": grid.shape[1],
        "peer_grid": None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1500)
    parser.add_argument("--height", type=int, default=1000)
    parser.add_argument("--repetitions", type=int, default=25)
    options = parser.parse_args()
    size = options.width, options.height
    give_back_freed_memory()  # as a scoring actor does
    places = {"dataset": {"images": "memory://bench/in"}, "output": {"uri": "memory://bench/out"}}
    job = parse_job({**places, "run_date": "2026-01-02"})
    run, output, thresholds = Run("bench", job, "bench", "0" * 64), Store(job.output.uri), Thresholds(0.5, THRESHOLD)
    runs: dict[str, Callable[[], object]] = {}
    for name, grid in make_grids().items():
        runs[f"{name}, plain"] = functools.partial(mark_plainly, grid, *size)
        row = make_row(grid, *size)
        runs[f"{name}, write_mask"] = functools.partial(write_mask, row, thresholds, run.version, run, output)
    seconds = measure(runs, options.repetitions)
    rows = []
    for name, grid in make_grids().items():
        plain, ours = (seconds[f"{name}, {way}"] for way in ("plain", "write_mask"))
        found = write_mask(make_row(grid, *size), thresholds, run.version, run, output)["regions"]
        rows.append((name, str(len(found)), f"{plain * 1e3:.1f}", f"{ours * 1e3:.1f}", f"{plain / ours:.1f}"))
    columns = ("mask", "regions", "plain, ms", "write_mask, ms", "ratio")
    print_table(f"masks of {options.width} x {options.height}, one thread", columns, rows)
    write_results("masks", {"width": options.width, "height": options.height, "seconds": seconds})


if __name__ == "__main__":
    main()
