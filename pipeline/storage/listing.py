"""What a listing says of objects."""

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

_CHUNK = 4096
"""Files that are asked for at once: enough that a thread seldom waits for Python's lock."""

_THREADS = 2

_AHEAD = 16
"""Chunks that are asked for ahead: enough to do while the names of the next folder are read."""


class ObjectInfo(NamedTuple):
    """An object in a listing: key below the store's root, bytes, what tells versions apart, seconds since the epoch at
    which it was last written (null where unknown)."""

    key: str
    size: int | None
    etag: str | None
    modified: float | None = None


class Page(NamedTuple):
    """Some objects of a listing, by column: of the millions of a listing, most are looked at no other way."""

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
        """The objects for which it is true."""
        return self if all(wanted) else Page._make(list(compress(column, wanted)) for column in self)


def describe(key: str, info: dict[str, Any]) -> ObjectInfo:
    """An object as fsspec tells of it."""
    version = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("mtime") or info.get("created")
    if isinstance(version, datetime):
        version = version.isoformat()
    etag = None if version is None else str(version).strip('"')
    return ObjectInfo(key, info.get("size"), etag, _modified(info))


def _modified(info: dict[str, Any]) -> float | None:
    """File systems differ in what they call the time of the last write, and in how they give it."""
    names = ("LastModified", "last_modified", "updated", "mtime", "created")
    value = next((info[name] for name in names if info.get(name)), None)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = datetime.fromisoformat(value.replace("Z", "+00:00"))
    if isinstance(value, datetime):
        return value.timestamp()
    return float(value) if isinstance(value, (int, float)) else None


def local_etag(mtime_ns: int, size: int) -> str:
    """The version of a local file, which stands for its ETag."""
    return f"{mtime_ns:x}-{size:x}"


def walk_local(folder: str, prefix: str) -> Iterator[Page]:
    """Depth first, by name; symbolic links to folders are not followed (they may form a ring).

    prefix: what keys begin with in this folder. Holds the names of a folder, and what it asks of some thousand files.
    """
    names = chain.from_iterable(_walk_names(folder, ""))
    for chunk, infos in _stat_ahead(folder, iter(lambda: list(islice(names, _CHUNK)), [])):
        sizes = [info.size for info in infos]
        times = [-1 if info.mtime_ns is None else info.mtime_ns for info in infos]  # Arrow takes -1 for unknown
        yield Page(
            [prefix + name for name in chunk],
            sizes,
            [None if size is None else local_etag(time, size) for time, size in zip(times, sizes, strict=True)],
            [time / 1e9 for time in times],
        ).where([size is not None for size in sizes])  # else vanished, a link that leads elsewhere, or a pipe


def _walk_names(folder: str, prefix: str) -> Iterator[list[str]]:
    """All that lies below a folder and is none itself, from there, in the order of walk_local; some at a time."""
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
    """Chunks of names with what the file system says of them, asked by threads while the consumer works.

    Arrow asks for a whole chunk without Python's lock; of os.stat, threads would only get in each other's way.
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
        yield from map_ahead(pool, stat, chunks, ahead=_AHEAD)
