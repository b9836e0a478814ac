"""Few-shot: which known-good images a class is compared with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def choose_references(rows: Sequence[Row], shots: int, seed: int) -> dict[str, list[Row]]:
    """For each class, `shots` of its images: those whose hash with the seed is lowest, so more shots keep those of
    fewer, and images that are added elsewhere change nothing. Where there are fewer, all. rows: manifest rows."""
    by_class: dict[str, list[Row]] = {}
    for row in rows:
        by_class.setdefault(row["class_name"], []).append(row)

    def rank(row: Row) -> tuple[bytes, str]:
        text = f"{seed}\0{row['class_name']}\0{row['key']}"
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), row["key"]

    return {name: sorted(found, key=rank)[:shots] for name, found in by_class.items()}


def describe_choice(chosen: Mapping[str, Sequence[Row]], classes: Sequence[str], shots: int) -> list[str]:
    """A line for each class that has fewer references than were asked for."""
    lines = []
    for name in classes:
        count = len(chosen.get(name, ()))
        if not count:
            lines.append(f"class {name} has no reference images; it is scored zero-shot")
        elif count < shots:
            lines.append(f"class {name} has {count} reference images, not {shots}; all of them are used")
    return lines
