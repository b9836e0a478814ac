"""Sorts the rows of a night within each class, in bounded memory: an external merge sort.

Rows are collected until they fill a buffer, then sorted and written to one local file as a run of small record batches.
A class is then read as the merge of its runs. Memory holds the buffer and its sorted copy, or a few batches of each run
of a class. The file is compressed Arrow, about a tenth of the size of the rows in memory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_BUFFER_BYTES = 64 << 20
"""Bytes of rows of all classes together that are collected before some are sorted."""

_BATCH = 512
"""Rows per batch of the file. One or two batches of each run are in memory while a class is merged."""

Order = Sequence[tuple[str, str]]


class RowSorter:
    """Takes rows in any order, and returns those of a class in order. A context manager; it leaves its file behind.

    A thread sorts and writes rows while more are added.
    """

    def __init__(self, path: Path, schema: pa.Schema, order: Order) -> None:
        """path: the local file to write. order: columns, each ascending or descending; nulls come last."""
        self._path, self._schema, self._order = path, schema, list(order)
        self._waiting: defaultdict[str, list[pa.Table]] = defaultdict(list)
        self._sizes: Counter[str] = Counter()
        self._runs: defaultdict[str, list[range]] = defaultdict(list)
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
        self._sizes[class_name] += rows.nbytes
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
        """Yields the rows of a class in order, `size` at a time, as tables of one chunk."""
        # Not as a memory map, because its pages would count as this process's memory.
        with pa.OSFile(str(self._path)) as source, pa.ipc.open_file(source) as file:
            runs = [map(file.get_batch, run) for run in self._runs[class_name]]
            yield from regroup(_merge(runs, self._order), size)

    def _start_run(self, class_name: str) -> None:
        """Waits for the previous run, then has the thread sort and write the waiting rows of a class."""
        self._await_run()
        del self._sizes[class_name]
        self._sorting = self._thread.submit(self._write_run, class_name, self._waiting.pop(class_name))

    def _await_run(self) -> None:
        if self._sorting is not None:
            self._sorting.result()

    def _write_run(self, class_name: str, tables: list[pa.Table]) -> None:
        rows = pa.concat_tables(tables).cast(self._schema).sort_by(self._order)
        first = self._batches
        for batch in rows.to_batches(_BATCH):
            self._writer.write_batch(batch)
            self._batches += 1
        self._runs[class_name].append(range(first, self._batches))


def _merge(runs: Sequence[Iterator[pa.RecordBatch]], order: list[tuple[str, str]]) -> Iterator[pa.Table]:
    """Merges sorted runs. One or two batches of each run are in memory.

    Each run that is not at its end has a last row read so far. Rows up to the first of these can be yielded, because no
    row that is still unread comes before it.
    """
    unread = dict(enumerate(runs))
    waiting = [pa.Table.from_batches([next(run)]) for run in runs]
    while True:
        for number in list(unread):
            if waiting[number].num_rows < _BATCH:
                batch = next(unread[number], None)
                if batch is None:
                    del unread[number]
                else:
                    waiting[number] = pa.concat_tables([waiting[number], pa.Table.from_batches([batch])])
        pool = pa.concat_tables(waiting)
        places = np.asarray(pc.sort_indices(pool.select([name for name, _ in order]), sort_keys=order))
        origin = np.repeat(np.arange(len(runs)), [table.num_rows for table in waiting])[places]
        end = min((_last(origin, number) for number in unread), default=len(origin) - 1) + 1
        yield pool.take(places[:end])
        if not unread:
            return
        given = np.bincount(origin[:end], minlength=len(runs)).tolist()
        waiting = [table.slice(count) for table, count in zip(waiting, given, strict=True)]


def _last(values: npt.NDArray[np.int64], value: int) -> int:
    """Returns the last place at which `values` equals `value`; there must be one."""
    return int(np.flatnonzero(values == value)[-1])


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
