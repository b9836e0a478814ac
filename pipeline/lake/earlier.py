"""Finds photos of earlier nights that may serve as peers, for classes with too few photos tonight."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.lake.commits import published_nights, read_commit
from pipeline.lake.reading import read_groups
from pipeline.storage import Store
from schemas.records import CommitFile

_NIGHTS_SEARCHED = 30
"""How many of the last published nights are searched."""
_READERS = 16
_COLUMNS = ("image_id", "image_uri", "image_etag", "is_anomalous")


def find_earlier(
    output: Store, run_date: datetime.date, wanted: Mapping[str, int]
) -> dict[str, list[Mapping[str, Any]]]:
    """Finds photos of each class in the latest nights before a date, as rows with uri, etag and image_id.

    wanted: by class, how many photos at most. Photos that are errors or count as anomalous are left out. Within a
    night, those with the lowest ids come first.
    """
    found: dict[str, dict[str, Mapping[str, Any]]] = {name: {} for name in wanted}
    nights = [night for night in published_nights(output) if night < str(run_date)]
    with ThreadPoolExecutor(_READERS, "peers") as pool:
        for night in reversed(nights[-_NIGHTS_SEARCHED:]):
            missing = [name for name, count in wanted.items() if len(found[name]) < count]
            commit = read_commit(output, night) if missing else None
            files = [file for file in commit.files if file.class_name in missing] if commit else []
            rows = pool.map(lambda file: _read_good(output, file, wanted[file.class_name]), files)
            for file, some in zip(files, rows, strict=True):
                known = found[file.class_name]
                for row in some[: wanted[file.class_name] - len(known)]:
                    known.setdefault(row["image_id"], row)
    return {name: list(rows.values()) for name, rows in found.items() if rows}


def _read_good(output: Store, file: CommitFile, most: int) -> list[Mapping[str, Any]]:
    groups = read_groups(output, file, _COLUMNS)
    table = pa.concat_tables([group.filter(pc.equal(group.column("is_anomalous"), False)) for group in groups])
    lowest = table.take(pc.select_k_unstable(table, most, [("image_id", "ascending")]))
    rows: list[Mapping[str, Any]] = lowest.select(_COLUMNS[:3]).rename_columns(["image_id", "uri", "etag"]).to_pylist()
    return rows
