"""Names from the outside (classes, keys) as safe paths: nothing leaves its folder, different names stay different."""

from __future__ import annotations

import hashlib
import string

_PLAIN = frozenset((string.ascii_letters + string.digits + "-_.").encode())
_LONGEST = 200
"""Bytes of one path segment; file systems allow 255, and suffixes come on top."""


def safe_segment(name: str) -> str:
    """One path segment: bytes outside [A-Za-z0-9._-] and a leading dot are percent-encoded; the empty name is `%`.

    A longer result is cut and ends in `%~` and a hash, which quoting alone never produces: the map stays injective.
    """
    if not name:
        return "%"
    data = name.encode("utf-8", "surrogatepass")
    quoted = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in data)
    if quoted.startswith("."):
        quoted = "%2E" + quoted[1:]
    if len(quoted) > _LONGEST:
        quoted = f"{quoted[: _LONGEST - 34]}%~{hashlib.blake2b(data, digest_size=16).hexdigest()}"
    return quoted


def safe_path(key: str) -> str:
    """A relative path of safe segments, one for each part of a key between slashes.

    A folder's name that ends in `.png` has that dot encoded, so a folder never stands where another key's mask lies.
    """
    *folders, name = (safe_segment(part) for part in key.split("/"))
    folders = [f"{part[:-4]}%2E{part[-3:]}" if part.lower().endswith(".png") else part for part in folders]
    path = "/".join([*folders, name])
    if len(path) > _LONGEST * 4:
        path = f"%~{hashlib.blake2b(key.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"
    return path
