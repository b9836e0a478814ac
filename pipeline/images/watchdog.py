"""A watchdog for decoders that never end. Nothing can stop a thread that hangs in C, so it ends the process."""

from __future__ import annotations

import faulthandler
import math
import threading
import time

LIMIT_S = 300.0
"""Seconds after which a decoder counts as hung."""


class HangGuard:
    """Ends the process if images are being decoded, but none is finished for limit_s seconds.

    It then prints the stack of each thread to stderr. Enter it around each decoding, in any thread. Use one per
    process.
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._inside = 0
        self._set_at = -math.inf

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._set()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                faulthandler.cancel_dump_traceback_later()
            elif time.monotonic() - self._set_at > self._limit_s / 10:
                self._set()

    def _set(self) -> None:
        # faulthandler's thread needs no interpreter lock, so it works even if the hanging decoder holds the lock.
        self._set_at = time.monotonic()
        faulthandler.dump_traceback_later(self._limit_s, exit=True)
