"""Decodes images in another process, so that an image that kills its decoder kills nothing else.

Only shards over which a worker has died are decoded so. The process lives until an image ends it, because its imports
take seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from typing import IO, Any

import numpy as np

from pipeline.images.decoding import Cut, Decoded, ImageError, decode_image, measure_image
from pipeline.images.depth import Extremes, Span
from pipeline.images.watchdog import LIMIT_S
from schemas.tables import ErrorType

_FACTS = ("source_width", "source_height", "bit_depth", "clipped", "frames")
_LENGTHS = struct.Struct(">QQ")
"""The start of a message: the length of its JSON, and of the bytes behind it."""


class Isolation:
    """A process that decodes images. It starts with the first one. A context manager, for use by one thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def __enter__(self) -> Isolation:
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop()

    def decode(
        self,
        data: bytes,
        *,
        size: tuple[int, int],
        interpolation: str,
        max_pixels: int,
        cut: Cut | None = None,
        span: Span | None = None,
    ) -> Decoded:
        """Calls decode_image there. Raises ImageError, with type crashed if the process was killed or hung."""
        tile = None if cut is None else asdict(cut)
        options = {"size": size, "interpolation": interpolation, "max_pixels": max_pixels, "cut": tile, "span": span}
        answer, pixels = self._ask(options, data)
        image, *tiles = np.split(np.frombuffer(pixels, dtype=np.uint8).reshape(-1, *size, 3), [1])
        facts = {name: answer[name] for name in _FACTS}
        tiling = None if cut is None else cut.plan(answer["source_width"], answer["source_height"], max(size))
        return Decoded(image[0], **facts, tiles=None if tiling is None else tiles[0], tiling=tiling)

    def measure(self, data: bytes, *, max_pixels: int) -> Extremes | None:
        """Calls measure_image there. Raises ImageError as decode does."""
        answer, _ = self._ask({"max_pixels": max_pixels}, data)
        return None if answer["extremes"] is None else Extremes(*answer["extremes"])

    def _ask(self, options: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """Sends a request. Returns the answer, and the bytes of the pixels if there are any."""
        is_first = self._process is None
        process = self._process or self._start()
        hung = threading.Event()

        def give_up() -> None:
            hung.set()
            process.kill()

        timer = threading.Timer(LIMIT_S, give_up)
        timer.start()
        try:
            message = _exchange(process, options, data)
        finally:
            timer.cancel()
        if message is None:
            error = self._explain_end(process.wait(), hung.is_set())
            self._stop()
            if is_first or hung.is_set():
                raise error
            return self._ask(options, data)  # an earlier image may have done the damage
        answer, pixels = message
        if "error_type" in answer:
            raise ImageError(ErrorType(answer["error_type"]), answer["message"])
        return answer, pixels

    def _start(self) -> subprocess.Popen[bytes]:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (_stop closes it)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.images.isolation"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        return self._process

    def _explain_end(self, code: int, hung: bool) -> ImageError:
        if hung:
            return ImageError(ErrorType.CRASHED, f"its decoder did not end within {LIMIT_S:g} s")
        if code < 0:
            message = f"its decoder was killed by {signal.Signals(-code).name}, after a worker had died over its shard"
            return ImageError(ErrorType.CRASHED, message)
        if code != 1:  # an exception in Python gives 1
            return ImageError(ErrorType.CRASHED, f"its decoder ended its process with exit code {code}")
        assert self._errors is not None
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        message = f"the process that was to decode it failed: {' '.join(last)[:300]}"
        return ImageError(ErrorType.INTERNAL, message)

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(BrokenPipeError):  # what it has not read is still to be written
                process.communicate()
        if self._errors is not None:
            self._errors.close()


def _exchange(process: subprocess.Popen[bytes], options: dict[str, Any], data: bytes) -> tuple[Any, bytes] | None:
    """Sends a message, and returns the one that comes back; None if the process has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        _send(process.stdin, options, data)
    except BrokenPipeError:
        return None
    return _receive(process.stdout)


def _send(stream: IO[bytes], header: dict[str, Any], *data: bytes | memoryview) -> None:
    encoded = json.dumps(header).encode()
    stream.write(_LENGTHS.pack(len(encoded), sum(len(part) for part in data)) + encoded)
    for part in data:
        stream.write(part)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[Any, bytes] | None:
    """Returns the next message: its JSON, and the bytes behind it; None at the end of the stream."""
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    header_length, length = _LENGTHS.unpack(lengths)
    header, data = stream.read(header_length), stream.read(length)
    return (json.loads(header), data) if len(data) == length and len(header) == header_length else None


def _serve() -> None:
    """Answers requests on standard input by messages on standard output."""
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # a library that prints must not disturb the messages
        while (message := _receive(sys.stdin.buffer)) is not None:
            _send(out, *_answer(*message))


def _answer(arguments: dict[str, Any], data: bytes) -> tuple[Any, ...]:
    try:
        if "size" not in arguments:
            return ({"extremes": measure_image(data, **arguments)},)
        cut, span = arguments.pop("cut"), arguments.pop("span")
        decoded = decode_image(
            data, **arguments, cut=None if cut is None else Cut(**cut), span=None if span is None else Span(*span)
        )
    except ImageError as error:
        return ({"error_type": error.error_type.value, "message": error.message},)
    facts = {name: getattr(decoded, name) for name in _FACTS}
    return facts, decoded.pixels.tobytes(), b"" if decoded.tiles is None else decoded.tiles.tobytes()


if __name__ == "__main__":
    _serve()
