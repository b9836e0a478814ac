"""Reads chosen columns and rows of a published class, so that a class of millions need not fit in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import Store
from schemas.records import CommitFile


@contextlib.contextmanager
def open_file(output: Store, entry: CommitFile) -> Iterator[pq.ParquetFile]:
    """Opens the file of a class. entry: one of a commit's files."""
    # The files that a commit names are never overwritten, so they can be read range by range.
    with output.open(entry.key) as source, pq.ParquetFile(source, pre_buffer=True) as file:
        yield file


def read_groups(output: Store, entry: CommitFile, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yields the rows of a class in order, one row group at a time. columns: only these columns; None: all."""
    with open_file(output, entry) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, None if columns is None else list(columns))


def take_rows(
    output: Store, entry: CommitFile, places: npt.NDArray[np.int64], columns: Sequence[str] | None = None
) -> pa.Table:
    """Returns the rows at these places of a class, in the order of `places`.

    Reads only the row groups that hold them.
    """
    with open_file(output, entry) as file:
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        ends = np.cumsum(sizes, dtype=np.int64)
        ordered = np.sort(places)
        groups = np.searchsorted(ends, ordered, side="right")
        wanted = None if columns is None else list(columns)
        parts = [file.schema_arrow.empty_table() if wanted is None else file.schema_arrow.empty_table().select(wanted)]
        for number in np.unique(groups).tolist():
            inside = ordered[groups == number] - (ends[number] - sizes[number])
            parts.append(file.read_row_group(number, wanted).take(inside))
    table = pa.concat_tables(parts)
    return table.take(np.argsort(np.argsort(places, kind="stable"), kind="stable"))
