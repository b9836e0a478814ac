"""Measures how long Python holds the interpreter's lock: a second process looks, some thousand times a second.

CPython has a word in its static memory that is zero while no thread holds the lock. A process finds that word itself:
it copies the static memory once with the lock held, and once by a call that gives the lock up. The second process reads
the word without stopping or slowing the first. The share of looks that find the lock held is right on a busy machine,
too.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

_WORD = 8
_MOST_BYTES = 1 << 20
"""More than the static memory of any CPython."""

_PAUSE_S = 1e-4
"""Between two looks."""

_PR_SET_PTRACER = 0x59616D61


@dataclass(frozen=True)
class Cost:
    """What a run took, in seconds: of cores, of all threads of the process, and of the interpreter's lock."""

    core: float
    lock: float


class LockSampler:
    """Counts looks at the lock, and those that found it held."""

    def __init__(self, counts: Any) -> None:
        self._counts = counts

    def measure(self, run: Callable[[], object]) -> Cost:
        """Runs a function in this thread. It should take some tenths of a second; other threads should not run Python.

        The lock's time is the share of looks that found it held, of the time in which this thread had a core or waited
        for something other than a core.
        """
        looks, held = self._counts
        started, core, queued = time.perf_counter(), time.process_time(), _queued()
        run()
        wall, core, queued = time.perf_counter() - started, time.process_time() - core, _queued() - queued
        looks, held = self._counts[0] - looks, self._counts[1] - held
        return Cost(core, held / max(1, looks) * (wall - queued))


@contextlib.contextmanager
def sample_lock() -> Iterator[LockSampler]:
    """Starts the second process. Raises OSError where the system forbids to read the memory of another process."""
    with contextlib.suppress(OSError, AttributeError):  # where only parents may look: this process lets all look
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1))
    context = multiprocessing.get_context("spawn")
    counts = RawArray(ctypes.c_int64, 2)
    watcher = context.Process(target=_watch, args=(os.getpid(), _find_word(), counts), daemon=True)
    watcher.start()
    try:
        while not counts[0]:
            if not watcher.is_alive():
                raise PermissionError("this system forbids to read the memory of another process")
            time.sleep(0.01)
        yield LockSampler(counts)
    finally:
        watcher.terminate()
        watcher.join()


def _find_word() -> int:
    """Returns the address of a word that is zero while no thread holds the lock. Call it while one thread runs."""
    start = ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "_PyRuntime"))
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        found: set[int] | None = None
        for _ in range(3):
            free = os.pread(memory.fileno(), _MOST_BYTES, start)  # gives the lock up
            held = ctypes.string_at(start, len(free))  # keeps it
            words = range(0, len(free) - _WORD + 1, _WORD)
            some = {at for at in words if free[at : at + _WORD] == bytes(_WORD) != held[at : at + _WORD]}
            found = some if found is None else found & some
    if not found:
        raise OSError("this Python keeps its lock where it is not found")
    return start + min(found)


def _watch(process: int, address: int, counts: Any) -> None:
    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
        while True:
            held = os.pread(memory.fileno(), _WORD, address) != bytes(_WORD)
            counts[1] += held
            counts[0] += 1
            time.sleep(_PAUSE_S)


def _queued() -> float:
    """Seconds for which this thread was ready, but had no core; 0 where the system does not count them."""
    known = Path("/proc/thread-self/schedstat")
    return int(known.read_text().split()[1]) / 1e9 if known.exists() else 0.0
