"""Limits the memory of a process: if every thread decoded the largest image at once, a node could not hold them."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator


class Budget:
    """Lets threads hold amounts that add up to `most` at the same time; further threads wait.

    A larger amount waits until it can have the whole budget, so no thread waits for ever. A thread must not hold twice.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._held = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Waits until the amount fits into the budget, and holds it until the block ends."""
        share = min(amount, self.most)
        with self._changed:
            self._changed.wait_for(lambda: self._held + share <= self.most)
            self._held += share
        try:
            yield
        finally:
            with self._changed:
                self._held -= share
                self._changed.notify_all()


PIXELS = Budget(100_000_000)
"""Pixels that all threads together decode or mask at a time.

That is eight photos of 12 megapixels, or sixteen JPEGs that are decoded at a reduced size. A pixel takes at most about
25 bytes, so all of them take 2.5 GB, or 25 bytes for each of dataset.max_pixels if that is more.
"""

FILE_BYTES = Budget(500_000_000)
"""Bytes of all files that are being read or decoded at a time."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _LARGE_BLOCK_BYTES = 16 << 20, 8 << 20


def give_back_freed_memory() -> None:
    """Makes glibc return large freed blocks to the system; by itself it keeps up to 64 MB for each thread.

    It may keep 16 MB. Otherwise the arrays of a photo of about 1500 x 1000 pixels would be requested from the system
    page by page each time, which took longer than the work on them. Call it once in a process that decodes in threads.
    Other C libraries lack this call, and do not need it.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def trim_small_blocks() -> None:
    """Makes glibc return the small free blocks of all threads too: some decoders leave tens of MB of them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
