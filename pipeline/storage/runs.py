"""The run, and how the rows of its finished shards are stored."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

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
    """Encodes the rows of a finished shard as a Parquet file.

    It has no dictionaries, no statistics, no copy of the Arrow schema with its texts, and lz4 instead of zstd:
    thousands of such small files are then read in half the time, and their values hardly repeat.
    """
    buffer = pa.BufferOutputStream()
    pq.write_table(rows, buffer, compression="lz4", use_dictionary=False, write_statistics=False, store_schema=False)
    return bytes(buffer.getvalue())


def read_shard(output: Store, folder: str, shard_id: str, columns: list[str] | None = None) -> pa.Table:
    """Reads the rows of a finished shard, in schema SHARD. columns: only these columns; None: all."""
    return _decode_shard(output.read(paths.shard_key(folder, shard_id)), columns)


def _decode_shard(data: bytes, columns: list[str] | None) -> pa.Table:
    # read_table would first look for folders and partitions, which takes as long as reading the shard.
    return pq.ParquetFile(pa.BufferReader(data)).read(columns, use_threads=False)


def read_shards(
    output: Store, folder: str, shard_ids: Sequence[str], columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """Reads finished shards in order. Threads read ahead; at most 2 * _READERS encoded shards are in memory."""
    with ThreadPoolExecutor(_READERS, "read") as readers, ThreadPoolExecutor(_DECODERS, "decode") as decoders:
        keys = (paths.shard_key(folder, shard_id) for shard_id in shard_ids)
        files = map_ahead(readers, output.read, keys, ahead=2 * _READERS)
        yield from map_ahead(decoders, lambda data: _decode_shard(data, columns), files, ahead=2 * _DECODERS)
