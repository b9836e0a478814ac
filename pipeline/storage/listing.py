"""What a listing says of objects."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

STAGING = ".staging"
"""Folder below a local store's root that holds objects until they are whole; nothing reads it."""


class ObjectInfo(NamedTuple):
    """An object in a listing: key below the store's root, bytes, what tells versions apart, seconds since the epoch at
    which it was last written (null where unknown)."""

    key: str
    size: int | None
    etag: str | None
    modified: float | None = None


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


def walk_local(folder: str, prefix: str) -> Iterator[ObjectInfo]:
    """Depth first, by name; symbolic links to folders are not followed (they may form a ring).

    prefix: what keys begin with in this folder. Holds the names of a folder, and nothing else of its files.
    """
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
    for name in names:
        if name in folders:
            if name != STAGING:
                yield from walk_local(f"{folder}/{name}", f"{prefix}{name}/")
            continue
        try:
            status = os.stat(f"{folder}/{name}")
        except FileNotFoundError:  # vanished since listing, or a link that leads nowhere
            continue
        if stat.S_ISREG(status.st_mode):
            size = status.st_size
            yield ObjectInfo(prefix + name, size, f"{status.st_mtime_ns:x}-{size:x}", status.st_mtime)
