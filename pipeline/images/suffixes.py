"""Selects images from listed objects by their suffixes, and counts the objects that are left out."""

from __future__ import annotations

import logging
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from pipeline.storage import Page, Store

logger = logging.getLogger(__name__)

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".tif", ".tiff", ".webp", ".gif"),
    *(".avif", ".heic", ".heif", ".jp2", ".j2k", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
)
"""The suffixes of the formats that are read; HEIC and HEIF need an extra package."""

NONE = "none"
OTHER = "other"
"""Counts names whose suffix is too long or too odd to be shown."""

_OF_SYSTEMS = re.compile(r"(?:^|/)(?:@eaDir|#recycle|\$RECYCLE\.BIN|System Volume Information|lost\+found|__MACOSX)/")
"""Folders that storage systems and archives make by themselves: thumbnails, deleted files."""

_LONGEST_SUFFIX = 10
_MOST_SUFFIXES = 200
"""Number of different suffixes that are counted; names can be anything, so further ones count as OTHER."""
_SUFFIXES_SHOWN = 8


def resolve_suffixes(suffixes: Sequence[str] | None) -> tuple[str, ...]:
    """Resolves dataset.suffixes: `default` stands for SUFFIXES, `none` is kept for names without a suffix."""
    wanted: list[str] = []
    for suffix in ["default"] if suffixes is None else suffixes:
        wanted += SUFFIXES if suffix == "default" else [suffix]
    return tuple(wanted)


def image_pages(store: Store, suffixes: tuple[str, ...], left_out: Counter[str]) -> Iterator[Page]:
    """Lists the images of a store. Other objects are counted in left_out by suffix; hidden ones are skipped."""
    for page in store.pages():
        is_image = [_is_image(key, suffixes) for key in page.keys]
        if not all(is_image):
            _count([key for key, wanted in zip(page.keys, is_image, strict=True) if not wanted], left_out)
        images = page.where(is_image)
        yield images._replace(keys=[key if key.isascii() else _in_unicode(key) for key in images.keys])


def _is_image(key: str, suffixes: tuple[str, ...]) -> bool:
    wanted = key.lower().endswith(suffixes) or (NONE in suffixes and _suffix_of(key) == NONE)
    return wanted and not _is_hidden(key)


def _is_hidden(key: str) -> bool:
    return key.startswith(".") or "/." in key or _OF_SYSTEMS.search(key) is not None


def _suffix_of(key: str) -> str:
    return posixpath.splitext(key)[1].lower() or NONE


def _count(keys: Sequence[str], left_out: Counter[str]) -> None:
    """Counts the suffixes of keys. The number of different suffixes in left_out is bounded."""
    for key in keys:
        if not _is_hidden(key):
            suffix = _suffix_of(key)
            usual = len(suffix) <= _LONGEST_SUFFIX and suffix.isprintable() and " " not in suffix
            left_out[suffix if usual and (suffix in left_out or len(left_out) < _MOST_SUFFIXES) else OTHER] += 1


def _in_unicode(key: str) -> str:
    """Replaces a local name that is not UTF-8, which no table can hold, so that the file gets a row with an error."""
    readable = os.fsencode(key).decode("utf-8", "backslashreplace")
    if readable != key:
        logger.warning("%s: the name of this file is not UTF-8, so it cannot be scored; rename it", readable)
    return readable


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Describes the counts, such as `12 .raw, 3 without suffix`, the most frequent first; empty if there are none."""
    ranked = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    words = {NONE: "without suffix", OTHER: "of other kinds"}
    shown = [f"{count} {words.get(suffix, suffix)}" for suffix, count in ranked[:_SUFFIXES_SHOWN]]
    if rest := sum(count for _, count in ranked[_SUFFIXES_SHOWN:]):
        shown.append(f"{rest} more")
    return ", ".join(shown)
