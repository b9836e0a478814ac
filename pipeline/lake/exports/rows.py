"""Reads the rows of a published night with their masks."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.lake.commits import read_commit
from pipeline.lake.reading import read_groups
from pipeline.storage import Store
from schemas.records import Commit

Row = dict[str, Any]

_BATCH = 64
"""Rows whose masks are read ahead."""

_COLUMNS = [
    "image_id",
    "image_uri",
    "width",
    "height",
    "status",
    "score",
    "is_anomalous",
    "mask_uri",
    "regions",
    "model",
]


class ExportError(ValueError):
    """A night cannot be exported; the message says why."""


def find_night(output: Store, run: str) -> Commit:
    """Finds the commit of a night by its date, or by the id of the run that published it. Raises ExportError."""
    if not re.match(r"\d{4}-\d\d-\d\d(-|$)", run):
        raise ExportError(f"{run!r} is neither a night (YYYY-MM-DD) nor a run id (YYYY-MM-DD-...)")
    commit = read_commit(output, run[:10])
    if commit is None:
        raise ExportError(f"night {run[:10]} is not published at {output.uri('')}")
    if run not in (run[:10], commit.run_id):
        raise ExportError(f"run {run} is not published; night {run[:10]} was published by {commit.run_id}")
    return commit


def read_rows(output: Store, commit: Commit, *, masks: bool) -> Iterator[Row]:
    """Yields the rows that a commit names, with their class_name and a key `mask`, bool [height, width].

    `mask` is None for rows with status error, and for all rows if masks is False.
    """

    def complete(row: Row) -> Row:
        return {**row, "mask": _read_mask(output, row["mask_uri"]) if masks and row["mask_uri"] else None}

    with ThreadPoolExecutor(16, "export") as pool:
        for entry in commit.files:
            for group in read_groups(output, entry, _COLUMNS):
                for batch in group.to_batches(_BATCH):
                    rows = ({**row, "class_name": entry.class_name} for row in batch.to_pylist())
                    yield from pool.map(complete, rows)


def _read_mask(output: Store, uri: str) -> NDArray[np.bool_]:
    return np.asarray(Image.open(io.BytesIO(output.read_uri(uri)))) > 0
