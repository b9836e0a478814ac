"""Sorts the rows of a night within each class, in bounded memory.

Rows are collected until they fill a buffer. Then they are sorted and written to one local file, as a run of small
record batches. In memory remains a number for each row, its sort key. The keys of all runs together say where the first
65,536 rows of the class end, the next, and so on. In each run these rows lie one after the other, because the run is
sorted. So a class is read as one group of rows after the other, each row once, and only the group has to be sorted.

Memory holds the buffer and its sorted copy, or a group, its sorted copy and a batch of each run; and 16 bytes per row
for the keys and their sorted copy. The file is compressed Arrow, about a tenth of the size of the rows in memory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

ORDER = [("score", "descending"), ("image_id", "ascending")]
"""The order of rows; rows without a score come last."""

_BUFFER_BYTES = 64 << 20
"""Bytes of rows of all classes together that are collected before some are sorted."""

_BATCH = 1024
"""Rows per batch of the file. One batch of each run is in memory while a class is read."""

Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class _SortedRun:
    """Sorted rows of a class in the file. batches: their numbers; keys [rows]: ascending."""

    batches: range
    keys: Keys


class RowSorter:
    """Takes rows in any order, and returns those of a class in ORDER. A context manager; it leaves its file behind.

    A thread sorts and writes rows while more are added.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """path: the local file to write. schema: of the rows; it has the columns of ORDER, and ids are hashes."""
        self._path, self._schema = path, schema
        self._waiting: defaultdict[str, list[pa.Table]] = defaultdict(list)
        self._sizes: Counter[str] = Counter()
        self._runs: defaultdict[str, list[_SortedRun]] = defaultdict(list)
        self._batches = 0
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._writer: Any = pa.ipc.new_file(str(path), schema, options=options)
        self._thread = ThreadPoolExecutor(1, "sort")
        self._sorting: Future[None] | None = None

    def __enter__(self) -> RowSorter:
        return self

    def __exit__(self, *failure: object) -> None:
        self._thread.shutdown()
        self._writer.close()

    def add(self, class_name: str, rows: pa.Table) -> None:
        """Adds rows of a class. Their columns must be those of the schema, in its order."""
        self._waiting[class_name].append(rows)
        self._sizes[class_name] += rows.get_total_buffer_size()  # nbytes would look at offsets, which takes longer
        if self._sizes.total() > _BUFFER_BYTES:
            self._start_run(max(self._sizes, key=lambda name: self._sizes[name]))

    def finish(self) -> list[str]:
        """Sorts the remaining rows; afterwards classes can be read. Returns the sorted names of the classes."""
        for class_name in sorted(self._waiting):
            self._start_run(class_name)
        self._await_run()
        self._writer.close()
        return sorted(self._runs)

    def read(self, class_name: str, size: int) -> Iterator[pa.Table]:
        """Yields the rows of a class in order, as tables of one chunk.

        Each table has `size` rows, and the last one fewer. It has a few more or fewer where rows have the same key.
        """
        runs = self._runs[class_name]
        keys = np.concatenate([run.keys for run in runs])
        keys.sort()
        ends = keys[size - 1 :: size].copy()
        del keys
        # Not as a memory map, because its pages would count as this process's memory.
        with pa.OSFile(str(self._path)) as source, pa.ipc.open_file(source) as file:
            cuts = [_cut_rows(map(file.get_batch, run.batches), _count_rows(run.keys, ends)) for run in runs]
            for parts in zip(*cuts, strict=True):
                rows = pa.Table.from_batches(chain.from_iterable(parts), self._schema)
                if rows.num_rows:
                    yield _sort_rows(rows)

    def _start_run(self, class_name: str) -> None:
        """Waits for the previous run, then has the thread sort and write the waiting rows of a class."""
        self._await_run()
        del self._sizes[class_name]
        self._sorting = self._thread.submit(self._write_run, class_name, self._waiting.pop(class_name))

    def _await_run(self) -> None:
        if self._sorting is not None:
            self._sorting.result()

    def _write_run(self, class_name: str, tables: list[pa.Table]) -> None:
        rows = _sort_rows(pa.concat_tables(tables).combine_chunks().cast(self._schema))  # chunk by chunk takes longer
        first = self._batches
        for batch in rows.to_batches(_BATCH):
            self._writer.write_batch(batch)
            self._batches += 1
        self._runs[class_name].append(_SortedRun(range(first, self._batches), _sort_keys(rows)))


def _sort_rows(rows: pa.Table) -> pa.Table:
    """Returns the rows in ORDER, in one chunk."""
    rows = rows.combine_chunks()  # take would do it, too, but take longer
    return rows.take(pc.sort_indices(rows.select([name for name, _ in ORDER]), sort_keys=ORDER))


def _sort_keys(rows: pa.Table) -> Keys:
    """Returns a number [rows] for each row. Rows with different numbers are in ORDER if their numbers ascend.

    The upper half follows from the score: the bits of a float32, which are in its order if those of negative numbers
    are inverted and others get a 1 in front. The lower half is the first four bytes of image_id.
    """
    score = rows.column("score").to_numpy()  # NaN: no score
    bits = (np.float32(0) - score).view(np.uint32)
    upper = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    upper[np.isnan(score)] = 0xFFFFFFFF
    heads = pc.binary_slice(rows.column("image_id").cast(pa.binary()), 0, 4).to_pylist()
    lower = np.array(heads, "S4").view(">u4")
    keys: Keys = upper.astype(np.uint64) << np.uint64(32) | lower
    return keys


def _count_rows(keys: Keys, ends: Keys) -> list[int]:
    """Returns how many rows of a run belong to each group. ends: the last key of each group but the last one."""
    places = np.searchsorted(keys, ends, side="right")
    counts: list[int] = np.diff(places, prepend=0, append=len(keys)).tolist()
    return counts


def _cut_rows(batches: Iterator[pa.RecordBatch], counts: Sequence[int]) -> Iterator[list[pa.RecordBatch]]:
    """Yields, for each count, so many of the next rows."""
    rest = None
    for count in counts:
        parts = []
        while count:
            if rest is None or not rest.num_rows:
                rest = next(batches)
            parts.append(rest.slice(0, count))
            rest = rest.slice(parts[-1].num_rows)
            count -= parts[-1].num_rows
        yield parts


def regroup(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """Yields the same rows as tables of `size` rows; the last may be smaller."""
    waiting: list[pa.Table] = []
    rows = 0
    for table in tables:
        while rows + table.num_rows >= size:
            yield pa.concat_tables([*waiting, table.slice(0, size - rows)]).combine_chunks()
            table, waiting, rows = table.slice(size - rows), [], 0
        if table.num_rows:
            waiting.append(table)
            rows += table.num_rows
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()
