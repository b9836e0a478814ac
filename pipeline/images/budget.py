"""What the threads of a process hold at once: each with the largest image would be more memory than a node has."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator


class Budget:
    """Lets threads work at the same time on what adds up to `most`; the others wait.

    What is larger than that has the budget to itself, so nothing waits for ever. A thread must not hold twice.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._held = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Waits until the amount fits in, and takes it until the block ends."""
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
"""Pixels that all threads decode or mask at a time: eight photos of 12 megapixels go through side by side, or sixteen
JPEGs that are decoded at a reduced size. Either takes at most some 25 bytes a pixel: together 2.5 GB, or 25 bytes for
each of dataset.max_pixels where that is more."""

FILE_BYTES = Budget(500_000_000)
"""Bytes of the files that are being read or decoded."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT, _GIVEN_BACK = 16 << 20, 8 << 20


def give_back_freed_memory() -> None:
    """Has glibc return large blocks to the system when they are freed; it would keep up to 64 MB for each thread.

    16 MB are kept: the arrays of a photo of some 1500 x 1000 pixels would else come from the system page by page, each
    time, which took longer than what is done with them. To be called once by a process that decodes in threads. Other
    C libraries have no such call and no such habit.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _GIVEN_BACK)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT)


def trim_small_blocks() -> None:
    """Has glibc return small blocks too that are free, of all threads: some decoders leave tens of MB of them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
