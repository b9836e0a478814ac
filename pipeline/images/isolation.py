"""Decodes an image in a process of its own, so that an image that kills its decoder kills nothing else.

This costs a second per image, so it is only used for shards over which a worker has died.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.images.decoding import Cut, Decoded, ImageError, decode_image, measure_image
from pipeline.images.depth import Extremes, Span
from pipeline.images.watchdog import LIMIT_S
from schemas.tables import ErrorType


def decode_isolated(
    data: bytes,
    *,
    size: tuple[int, int],
    interpolation: str,
    max_pixels: int,
    cut: Cut | None = None,
    span: Span | None = None,
) -> Decoded:
    """Calls decode_image in a new process. Raises ImageError, with type crashed if the process was killed or hung."""
    tile = None if cut is None else asdict(cut)
    options = {"size": size, "interpolation": interpolation, "max_pixels": max_pixels, "cut": tile, "span": span}
    answer, pixels = _ask(data, options)
    image, *tiles = np.split(np.frombuffer(pixels, dtype=np.uint8).reshape(-1, *size, 3), [1])
    facts = {name: answer[name] for name in _FACTS}
    tiling = None if cut is None else cut.plan(answer["source_width"], answer["source_height"], max(size))
    return Decoded(image[0], **facts, tiles=None if tiling is None else tiles[0], tiling=tiling)


def measure_isolated(data: bytes, *, max_pixels: int) -> Extremes | None:
    """Calls measure_image in a new process. Raises ImageError as decode_isolated does."""
    answer, _ = _ask(data, {"max_pixels": max_pixels})
    return None if answer["extremes"] is None else Extremes(*answer["extremes"])


_FACTS = ("source_width", "source_height", "bit_depth", "clipped", "frames")


def _ask(data: bytes, options: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Runs _serve in a new process. Returns its answer, and the bytes of the pixels if there are any."""
    command = [sys.executable, "-m", "pipeline.images.isolation", json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(command, input=data, capture_output=True, env=environment, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise ImageError(ErrorType.CRASHED, f"its decoder did not end within {LIMIT_S:g} s") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ImageError(ErrorType.CRASHED, f"its decoder was killed by {name}, after a worker had died over its shard")
    if done.returncode > 1:  # an exception in Python gives 1
        raise ImageError(ErrorType.CRASHED, f"its decoder ended its process with exit code {done.returncode}")
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ImageError(ErrorType.INTERNAL, f"the process that was to decode it failed: {' '.join(last)[:300]}")
    header, _, pixels = done.stdout.partition(b"\n")
    answer = json.loads(header)
    if "error_type" in answer:
        raise ImageError(ErrorType(answer["error_type"]), answer["message"])
    return answer, pixels


def _serve(options: str) -> None:
    """Decodes the bytes on standard input. Writes a line of JSON, and the pixels if any, to standard output."""
    out = sys.stdout.buffer
    try:
        arguments, data = json.loads(options), sys.stdin.buffer.read()
        if "size" not in arguments:
            out.write(json.dumps({"extremes": measure_image(data, **arguments)}).encode() + b"\n")
            return
        cut, span = arguments.pop("cut"), arguments.pop("span")
        decoded = decode_image(
            data, **arguments, cut=None if cut is None else Cut(**cut), span=None if span is None else Span(*span)
        )
    except ImageError as error:
        out.write(json.dumps({"error_type": error.error_type.value, "message": error.message}).encode() + b"\n")
        return
    facts = {name: getattr(decoded, name) for name in _FACTS}
    out.write(json.dumps(facts).encode() + b"\n" + decoded.pixels.tobytes())
    if decoded.tiles is not None:
        out.write(decoded.tiles.data)


if __name__ == "__main__":
    _serve(sys.argv[1])
