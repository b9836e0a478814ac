"""Rows of a published night, with the masks that they name."""

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
"""Rows whose masks are fetched at once."""

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
    """There is nothing that could be exported; the message says what is there."""


def find_night(output: Store, run: str) -> Commit:
    """The commit of a night, by its date or by the id of the run that it belongs to. Raises ExportError."""
    if not re.match(r"\d{4}-\d\d-\d\d(-|$)", run):
        raise ExportError(f"{run!r} is neither a night (YYYY-MM-DD) nor a run id (YYYY-MM-DD-...)")
    commit = read_commit(output, run[:10])
    if commit is None:
        raise ExportError(f"night {run[:10]} is not published at {output.uri('')}")
    if run not in (run[:10], commit.run_id):
        raise ExportError(f"run {run} is not published; night {run[:10]} belongs to {commit.run_id}")
    return commit


def read_rows(output: Store, commit: Commit, *, masks: bool) -> Iterator[Row]:
    """The rows that a commit names, with their class_name and, if asked for, their mask, bool [height, width].

    Only rows with status ok have a mask; the others' is None.
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
