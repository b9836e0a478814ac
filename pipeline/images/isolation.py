"""Decoding in a process of its own: an image that kills its decoder by a signal takes nothing else with it.

It costs a second an image, so it is the way of shards over which a worker has died.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import numpy as np

from pipeline.images.decoding import Cut, Decoded, ImageError, decode_image
from pipeline.images.watchdog import LIMIT_S
from pipeline.tiling import plan_tiling
from schemas.tables import ErrorType


def decode_isolated(
    data: bytes, *, size: tuple[int, int], interpolation: str, max_pixels: int, cut: Cut | None = None
) -> Decoded:
    """decode_image in a new process. Raises ImageError, of type crashed where its process did not end well."""
    tile = None if cut is None else asdict(cut)
    options = json.dumps({"size": size, "interpolation": interpolation, "max_pixels": max_pixels, "cut": tile})
    command = [sys.executable, "-m", "pipeline.images.isolation", options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(command, input=data, capture_output=True, env=environment, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise ImageError(ErrorType.CRASHED, f"its decoder did not end within {LIMIT_S:g} s") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ImageError(ErrorType.CRASHED, f"its decoder was killed by {name}, after a worker had died over its shard")
    if done.returncode > 1:  # Python itself ends with 1
        raise ImageError(ErrorType.CRASHED, f"its decoder ended its process with exit code {done.returncode}")
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ImageError(ErrorType.INTERNAL, f"the process that should decode it failed: {' '.join(last)[:300]}")
    header, _, pixels = done.stdout.partition(b"\n")
    answer = json.loads(header)
    if "error_type" in answer:
        raise ImageError(ErrorType(answer["error_type"]), answer["message"])
    image, *tiles = np.split(np.frombuffer(pixels, dtype=np.uint8).reshape(-1, *size, 3), [1])
    width, height = answer["source_width"], answer["source_height"]
    if cut is None:
        return Decoded(image[0], width, height)
    return Decoded(image[0], width, height, tiles[0], plan_tiling(width, height, cut.patches, cut.size, cut.overlap))


def _serve(options: str) -> None:
    """Bytes on standard input -> a line of JSON, and the pixels if there are any, on standard output."""
    out = sys.stdout.buffer
    try:
        arguments = json.loads(options)
        cut = arguments.pop("cut")
        decoded = decode_image(sys.stdin.buffer.read(), **arguments, cut=None if cut is None else Cut(**cut))
    except ImageError as error:
        out.write(json.dumps({"error_type": error.error_type.value, "message": error.message}).encode() + b"\n")
        return
    sizes = {"source_width": decoded.source_width, "source_height": decoded.source_height}
    out.write(json.dumps(sizes).encode() + b"\n" + decoded.pixels.tobytes())
    if decoded.tiles is not None:
        out.write(decoded.tiles.data)


if __name__ == "__main__":
    _serve(sys.argv[1])
