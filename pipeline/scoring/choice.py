"""Chooses photos of each class while a manifest streams by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


class LowestIds:
    """Chooses the photos of each class with the lowest ids.

    An id is a hash of address and version, so the choice is as good as random. It does not depend on the order of the
    photos, nor on other classes.
    """

    def __init__(self, most: int) -> None:
        """most: number of photos to choose from each class."""
        self._most = most
        self._tables: dict[str, pa.Table] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        """Considers rows of a manifest. They need the columns class_name and image_id; others are kept."""
        names = batch.column("class_name")
        for name in names.unique().to_pylist():
            rows = pa.Table.from_batches([batch.filter(pc.equal(names, name))])
            both = pa.concat_tables([self._tables[name], rows]) if name in self._tables else rows
            self._tables[name] = both.take(pc.select_k_unstable(both, self._most, [("image_id", "ascending")]))

    def watch(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Passes batches of a manifest on unchanged, and considers their rows."""
        for batch in batches:
            self.add(batch)
            yield batch

    @property
    def rows(self) -> dict[str, list[Mapping[str, Any]]]:
        """The chosen rows by class, the lowest id first."""
        return {name: table.to_pylist() for name, table in self._tables.items()}
