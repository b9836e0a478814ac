"""Writes listed images to a manifest, and cuts it into shards. Both are streamed: no step holds all images."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.storage import map_ahead
from schemas.tables import MANIFEST

_ID_COLUMNS = ("image_id", "class_name")
"""The columns of the manifest that are hashed into the ids of shards."""

_LAST_SHARE, _MOST_LAST, _PARTS = 4, 64, 4
"""A fourth of the shards, but at most 64, come last and are cut in four. So few actors idle while others end a night.

A night of 20 shards on eight equal actors took 1.09 times as long as an ideal split of it, instead of 1.37; one of 36
shards 1.06 instead of 1.15 (`python -m tests.bench.engine --only tail`).
"""

_REPEATED = ["class_name", "label"]
"""Columns that a dictionary makes smaller; in the others nearly every value is different."""


@dataclass(frozen=True)
class Manifest:
    """The images of a run, in a local Parquet file with schema MANIFEST.

    digest: hash (12 hex digits) of the ids and classes of all rows in order. classes: number of images by class.
    """

    path: Path
    digest: str
    classes: Mapping[str, int]

    @property
    def images(self) -> int:
        """Number of rows."""
        return sum(self.classes.values())

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Streams the rows from disk in order. columns: only these columns; None: all."""
        with pq.ParquetFile(self.path) as file:
            yield from file.iter_batches(columns=columns)


@dataclass(frozen=True)
class Shard:
    """The unit of work: some hundred rows of the manifest. shard_id: hash (16 hex digits) of their ids and classes."""

    shard_id: str
    images: pa.Table


def write_manifest(batches: Iterable[pa.RecordBatch], folder: Path) -> Manifest:
    """Writes listed images to a Parquet file in a local folder. Memory holds a few batches at a time."""
    digest = hashlib.blake2b(digest_size=6)
    classes: Counter[str] = Counter()
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".parquet", delete=False) as file:
        path = Path(file.name)

    def write(batch: pa.RecordBatch) -> None:
        writer.write_batch(batch)
        digest.update(_hashed(batch)[0])
        for entry in pc.value_counts(batch.column("class_name")).to_pylist():
            classes[entry["values"]] += entry["counts"]

    with (
        pq.ParquetWriter(path, MANIFEST, compression="zstd", use_dictionary=_REPEATED) as writer,
        ThreadPoolExecutor(1) as pool,
    ):
        deque(map_ahead(pool, write, batches, ahead=2), maxlen=0)
    return Manifest(path, digest.hexdigest(), dict(sorted(classes.items())))


def identify_shards(manifest: Manifest, size: int) -> dict[str, int]:
    """Returns the ids of the shards that cut_shards would make, in order, each with its number of images."""
    cut = _cut(manifest.batches(_ID_COLUMNS), _sizes(manifest.images, size))
    return {shard_id: sum(piece.num_rows for piece in pieces) for shard_id, pieces in cut}


def cut_shards(manifest: Manifest, size: int) -> Iterator[Shard]:
    """Yields consecutive shards of `size` images, and smaller ones at the end. The same images give the same ids."""
    for shard_id, pieces in _cut(manifest.batches(), _sizes(manifest.images, size)):
        table = pa.Table.from_batches(pieces)
        # take() copies the rows; a slice would be sent to the actor with its whole parent batch.
        yield Shard(shard_id, table.take(np.arange(table.num_rows)))


def _sizes(images: int, size: int) -> Iterator[int]:
    """Yields the sizes of shards without end; the images may end within one."""
    whole = images // size
    last = min(whole // _LAST_SHARE, _MOST_LAST)
    yield from itertools.repeat(size, whole - last)
    yield from itertools.repeat(max(1, size // _PARTS) if last else size)


def _cut(batches: Iterable[pa.RecordBatch], sizes: Iterator[int]) -> Iterator[tuple[str, list[pa.RecordBatch]]]:
    """Yields each shard's id and the slices of batches that it consists of."""
    digest, pieces, left = hashlib.blake2b(digest_size=8), [], next(sizes)
    for batch in batches:
        data, offsets = _hashed(batch)
        first = 0
        while first < batch.num_rows:
            last = min(first + left, batch.num_rows)
            digest.update(data[offsets[first] : offsets[last]])
            pieces.append(batch.slice(first, last - first))
            left -= last - first
            first = last
            if not left:
                yield digest.hexdigest(), pieces
                digest, pieces, left = hashlib.blake2b(digest_size=8), [], next(sizes)
    if pieces:
        yield digest.hexdigest(), pieces


def _hashed(batch: pa.RecordBatch) -> tuple[memoryview, npt.NDArray[np.int32]]:
    """Returns the bytes to hash of a batch, and the offsets of its rows in them [rows + 1].

    A row is its id and class, and ends in a byte that UTF-8 never contains.
    """
    ids, names = (batch.column(name).cast(pa.binary()) for name in _ID_COLUMNS)
    rows = pc.binary_join_element_wise(ids, b"\0", names, b"\xff", b"")  # the last argument is the separator
    _, offsets, data = rows.buffers()
    return memoryview(data or b""), np.frombuffer(offsets or b"", np.int32)
