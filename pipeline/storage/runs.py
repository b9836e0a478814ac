"""The run, and how the rows of its finished shards are stored."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from pipeline.storage import paths
from pipeline.storage.prefetch import map_ahead
from pipeline.storage.store import Store
from schemas.job import JobConfig

_READERS = 16
"""Finished shards that are read at once: object stores answer slowly, but many requests in parallel."""

_DECODERS = min(4, os.cpu_count() or 1)
"""Finished shards that are decoded at once. More threads would wait for the interpreter's lock and take longer."""


@dataclass(frozen=True)
class Run:
    """A run of a job. model: label of the model and its weights."""

    run_id: str
    job: JobConfig
    model: str
    weights_sha256: str

    @property
    def shards(self) -> str:
        """The folder of the finished shards."""
        return paths.run_key(self.run_id, "shards")

    @property
    def version(self) -> str:
        """The name of this run's masks among those of the night's other runs."""
        return paths.mask_version(self.run_id)


def encode_shard(rows: pa.Table) -> bytes:
    """Encodes the rows of a finished shard as an Arrow file.

    Publishing reads thousands of them. As Parquet, files of a few hundred rows took three times as long to read.
    """
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_file(buffer, rows.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as file:
        file.write_table(rows)
    return bytes(buffer.getvalue())


def read_shard(output: Store, folder: str, shard_id: str, columns: list[str] | None = None) -> pa.Table:
    """Reads the rows of a finished shard, in schema SHARD. columns: only these columns; None: all."""
    return _decode_shard(output.read(paths.shard_key(folder, shard_id)), columns)


def _decode_shard(data: bytes, columns: list[str] | None) -> pa.Table:
    # All columns are decoded: to find the wanted ones in the file first takes longer.
    with pa.ipc.open_file(pa.BufferReader(data), options=pa.ipc.IpcReadOptions(use_threads=False)) as file:
        rows = file.read_all()
    return rows if columns is None else rows.select(columns)


def read_shards(
    output: Store, folder: str, shard_ids: Sequence[str], columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """Reads finished shards in order. Threads read ahead; at most 2 * _READERS encoded shards are in memory."""
    with ThreadPoolExecutor(_READERS, "read") as readers, ThreadPoolExecutor(_DECODERS, "decode") as decoders:
        keys = (paths.shard_key(folder, shard_id) for shard_id in shard_ids)
        files = map_ahead(readers, output.read, keys, ahead=2 * _READERS)
        yield from map_ahead(decoders, lambda data: _decode_shard(data, columns), files, ahead=2 * _DECODERS)
