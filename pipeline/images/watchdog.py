"""A decoder that never ends: nothing can stop a thread that hangs in C, so the process is ended."""

from __future__ import annotations

import faulthandler
import math
import threading
import time

LIMIT_S = 300.0
"""Seconds after which a decoder counts as hung."""


class HangGuard:
    """Ends the process where images are being decoded and none gets done for so many seconds, and says on stderr what
    each thread was at. To be entered around each decoding, by any thread; one for a process."""

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
        # Its thread is no Python thread: it also ends a process in which a decoder hangs with the interpreter's lock.
        self._set_at = time.monotonic()
        faulthandler.dump_traceback_later(self._limit_s, exit=True)
