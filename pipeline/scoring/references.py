"""Few-shot: chooses the known-good images that a class is compared with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def choose_references(rows: Sequence[Row], shots: int, seed: int) -> dict[str, list[Row]]:
    """Chooses `shots` images of each class, or all where there are fewer: those whose hash with the seed is lowest.

    So more shots include those of fewer, and images that are added to other classes change nothing. rows: manifest
    rows.
    """
    by_class: dict[str, list[Row]] = {}
    for row in rows:
        by_class.setdefault(row["class_name"], []).append(row)

    def rank(row: Row) -> tuple[bytes, str]:
        text = f"{seed}\0{row['class_name']}\0{row['key']}"
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), row["key"]

    return {name: sorted(found, key=rank)[:shots] for name, found in by_class.items()}


def describe_choice(chosen: Mapping[str, Sequence[Row]], classes: Sequence[str], shots: int) -> list[str]:
    """Returns a line for each class that has fewer than `shots` references."""
    lines = []
    for name in classes:
        count = len(chosen.get(name, ()))
        if not count:
            lines.append(f"class {name} has no reference images; it is scored zero-shot")
        elif count < shots:
            lines.append(f"class {name} has {count} reference images, not {shots}; all of them are used")
    return lines
