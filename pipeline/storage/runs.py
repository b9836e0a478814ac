"""A run, and the rows of its finished shards."""

from __future__ import annotations

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
"""Finished shards that are read at once: object stores answer late, but many at a time."""


@dataclass(frozen=True)
class Run:
    """What all rows of a run share."""

    run_id: str
    job: JobConfig
    model: str
    weights_sha256: str

    @property
    def shards(self) -> str:
        """Folder of the finished shards."""
        return paths.run_key(self.run_id, "shards")

    @property
    def version(self) -> str:
        """Names the masks of this run among those of the night's other runs."""
        return paths.mask_version(self.run_id)


def encode_shard(rows: pa.Table) -> bytes:
    """A finished shard as its Parquet file.

    Dictionaries, statistics and zstd would cost whoever reads thousands of such small files twice the time, and their
    values hardly repeat.
    """
    buffer = pa.BufferOutputStream()
    pq.write_table(rows, buffer, compression="lz4", use_dictionary=False, write_statistics=False)
    return bytes(buffer.getvalue())


def read_shard(output: Store, folder: str, shard_id: str, columns: list[str] | None = None) -> pa.Table:
    """The rows of a finished shard, in schema SHARD."""
    data = pa.BufferReader(output.read(paths.shard_key(folder, shard_id)))
    # Not read_table, which asks about folders and partitions first: of a shard, that is half of the time.
    return pq.ParquetFile(data).read(columns, use_threads=False)


def read_shards(
    output: Store, folder: str, shard_ids: Sequence[str], columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """read_shard of each, in their order; threads read ahead, and no more than 2 * _READERS shards are in memory."""
    with ThreadPoolExecutor(_READERS, "read") as readers:
        yield from map_ahead(
            readers, lambda shard: read_shard(output, folder, shard, columns), shard_ids, ahead=2 * _READERS
        )
