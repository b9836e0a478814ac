"""Listings of objects: their columns, and the fast listing of local folders."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import chain, compress, groupby, islice
from typing import Any, NamedTuple

from pyarrow.fs import FileInfo, LocalFileSystem

from pipeline.storage.prefetch import map_ahead

STAGING = ".staging"
"""Folder below a local store's root that holds objects until they are whole; nothing reads it."""

_FILES_PER_CALL = 4096
"""Files whose sizes are read by one call: so many that a thread seldom waits for Python's lock."""

_THREADS = 2

_CALLS_AHEAD = 16
"""Calls that are in progress or waiting: enough to do while the names of the next folder are read."""


class ObjectInfo(NamedTuple):
    """An object in a listing.

    key: below the store's root. size: bytes. etag: differs between versions of the object. modified: when it was last
    written, in seconds since the epoch. Each but the key is None where unknown.
    """

    key: str
    size: int | None
    etag: str | None
    modified: float | None = None


class Page(NamedTuple):
    """Some thousand objects of a listing, by column: far cheaper than an ObjectInfo for each of millions."""

    keys: list[str]
    sizes: list[int | None]
    etags: list[str | None]
    modified: list[float | None]

    @classmethod
    def of(cls, objects: Sequence[ObjectInfo]) -> Page:
        return cls._make([item[number] for item in objects] for number in range(len(cls._fields)))

    def objects(self) -> Iterator[ObjectInfo]:
        return map(ObjectInfo._make, zip(*self, strict=True))

    def where(self, wanted: Sequence[bool]) -> Page:
        """Keeps the objects for which `wanted` is true."""
        return self if all(wanted) else Page._make(list(compress(column, wanted)) for column in self)


def describe(key: str, info: dict[str, Any]) -> ObjectInfo:
    """Builds an ObjectInfo from fsspec's description of an object."""
    version = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("mtime") or info.get("created")
    if isinstance(version, datetime):
        version = version.isoformat()
    etag = None if version is None else str(version).strip('"')
    return ObjectInfo(key, info.get("size"), etag, _modified(info))


def _modified(info: dict[str, Any]) -> float | None:
    """Finds the time of the last write, for which each file system has another name and type."""
    names = ("LastModified", "last_modified", "updated", "mtime", "created")
    value = next((info[name] for name in names if info.get(name)), None)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = datetime.fromisoformat(value.replace("Z", "+00:00"))
    if isinstance(value, datetime):
        return value.timestamp()
    return float(value) if isinstance(value, (int, float)) else None


def local_etag(mtime_ns: int, size: int) -> str:
    """Returns a string that stands for the ETag of a local file. mtime_ns: nanoseconds; size: bytes."""
    return f"{mtime_ns:x}-{size:x}"


def walk_local(folder: str, prefix: str) -> Iterator[Page]:
    """Lists all files below a folder, depth first and sorted by name.

    Symbolic links to folders are not followed, because they may form a cycle. Memory is bounded by the names in one
    folder and the sizes of some thousand files. prefix: put before each key.
    """
    names = chain.from_iterable(_walk_names(folder, ""))
    for chunk, infos in _stat_ahead(folder, iter(lambda: list(islice(names, _FILES_PER_CALL)), [])):
        sizes = [info.size for info in infos]
        times = [-1 if info.mtime_ns is None else info.mtime_ns for info in infos]  # Arrow's value for unknown is -1
        yield Page(
            [prefix + name for name in chunk],
            sizes,
            [None if size is None else local_etag(time, size) for time, size in zip(times, sizes, strict=True)],
            [time / 1e9 for time in times],
        ).where([size is not None for size in sizes])  # no size: vanished since, a broken link, or a pipe


def _walk_names(folder: str, prefix: str) -> Iterator[list[str]]:
    """Yields `prefix` and the path of each file below a folder, in the order of walk_local, some at a time."""
    names, folders = [], set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                names.append(entry.name)
                if entry.is_dir(follow_symlinks=False):
                    folders.add(entry.name)
    except FileNotFoundError:
        return
    names.sort()
    for is_folder, some in groupby(names, folders.__contains__):
        if not is_folder:
            yield [prefix + name for name in some]
            continue
        for name in some:
            if name != STAGING:
                yield from _walk_names(f"{folder}/{name}", f"{prefix}{name}/")


def _stat_ahead(folder: str, chunks: Iterator[list[str]]) -> Iterator[tuple[list[str], list[FileInfo]]]:
    """Yields each chunk of names with their FileInfo, which threads read while the consumer works.

    Arrow reads a whole chunk without Python's lock. Threads with os.stat would only wait for that lock.
    """
    local = LocalFileSystem()

    def stat(chunk: list[str]) -> tuple[list[str], list[FileInfo]]:
        paths = [f"{folder}/{name}" for name in chunk]
        try:
            return chunk, list(local.get_file_info(paths))
        except UnicodeEncodeError:  # a name that is no UTF-8
            return chunk, list(local.get_file_info([os.fsencode(path) for path in paths]))

    yield stat(next(chunks, []))
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from map_ahead(pool, stat, chunks, ahead=_CALLS_AHEAD)
