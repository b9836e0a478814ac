"""Reads objects and files that need not fit in memory, a part at a time."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def read_chunks(file: Path, size: int = 1 << 20) -> Iterator[bytes]:
    """Yields the content of a local file, `size` bytes at a time."""
    with file.open("rb") as source:
        while data := source.read(size):
            yield data


def sha256_of(chunks: Iterator[bytes]) -> str:
    """Returns the SHA-256 of all chunks together as 64 hex digits."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


class RangeReader(io.RawIOBase):
    """A seekable file over a remote object. Each read is a request, so read large ranges."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        """read: returns the bytes from a start to an end, the end excluded. size: size of the object in bytes."""
        self._read, self._size, self._place = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        end = min(self._place + len(buffer), self._size)
        if end <= self._place:
            return 0
        data = self._read(self._place, end)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)
