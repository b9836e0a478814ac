"""Listing -> manifest -> content-addressed shards, streamed: no step holds all images."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.tables import MANIFEST


@dataclass(frozen=True)
class Manifest:
    """The images of a run, in a local Parquet file in MANIFEST's schema.

    digest: 12 hex digits over ids and classes of all rows in order: equal digests mean equal work.
    """

    path: Path
    digest: str
    classes: Mapping[str, int]

    @property
    def images(self) -> int:
        """Number of rows."""
        return sum(self.classes.values())

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows, streamed from disk in their order."""
        with pq.ParquetFile(self.path) as file:
            yield from file.iter_batches()


@dataclass(frozen=True)
class Shard:
    """The unit of work: some hundred rows of the manifest. The id hashes what they are (16 hex digits)."""

    shard_id: str
    images: pa.Table


def write_manifest(batches: Iterable[pa.RecordBatch], folder: Path) -> Manifest:
    """Writes listed images to a Parquet file in a local folder; memory stays that of one batch."""
    digest = hashlib.blake2b(digest_size=6)
    classes: Counter[str] = Counter()
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".parquet", delete=False) as file:
        path = Path(file.name)
    with pq.ParquetWriter(path, MANIFEST, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)
            _update(digest, batch)
            for entry in pc.value_counts(batch.column("class_name")).to_pylist():
                classes[entry["values"]] += entry["counts"]
    return Manifest(path, digest.hexdigest(), dict(sorted(classes.items())))


def cut_shards(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[Shard]:
    """Consecutive shards of `size` images; the last may be smaller. The same images give the same ids."""
    waiting: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        while batch.num_rows:
            piece = batch.slice(0, size - count)
            batch = batch.slice(piece.num_rows)
            waiting.append(piece)
            count += piece.num_rows
            if count == size:
                yield _shard(waiting)
                waiting, count = [], 0
    if waiting:
        yield _shard(waiting)


def count_shards(images: int, size: int) -> int:
    """How many shards cut_shards makes."""
    return -(-images // size)


def _shard(batches: list[pa.RecordBatch]) -> Shard:
    digest = hashlib.blake2b(digest_size=8)
    for batch in batches:
        _update(digest, batch)
    table = pa.Table.from_batches(batches)
    # take copies: a slice would travel to the actor with its whole parent batch.
    return Shard(digest.hexdigest(), table.take(np.arange(table.num_rows)))


def _update(digest: hashlib.blake2b, batch: pa.RecordBatch) -> None:
    """Feeds ids and classes to a hash; every row ends in a byte that UTF-8 never contains."""
    ids, names = (batch.column(name).cast(pa.binary()) for name in ("image_id", "class_name"))
    rows = pc.binary_join_element_wise(ids, b"\0", names, b"\xff", b"")  # the last is the separator
    if rows:
        digest.update(rows.buffers()[2])
