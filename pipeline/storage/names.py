"""Turns names from outside (classes, keys) into safe paths: none leaves its folder, and no two become equal."""

from __future__ import annotations

import hashlib
import string

_PLAIN = frozenset((string.ascii_letters + string.digits + "-_.").encode())
_LONGEST = 200
"""Maximal bytes of one path segment. File systems allow 255, but suffixes are added to it."""


def safe_segment(name: str) -> str:
    """Turns a name into one path segment: percent-encodes a leading dot, and bytes outside [A-Za-z0-9._-].

    The empty name becomes `%`. A result longer than 200 bytes is cut, and ends in `%~` and a hash. Quoting never
    produces `%~`, so different names always give different segments.
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
    """Turns a key into a relative path, with one safe segment for each part between slashes.

    If a folder's name ends in `.png`, that dot is encoded, so that a folder never has the name of another key's mask.
    """
    *folders, name = (safe_segment(part) for part in key.split("/"))
    folders = [f"{part[:-4]}%2E{part[-3:]}" if part.lower().endswith(".png") else part for part in folders]
    path = "/".join([*folders, name])
    if len(path) > _LONGEST * 4:
        path = f"%~{hashlib.blake2b(key.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"
    return path
