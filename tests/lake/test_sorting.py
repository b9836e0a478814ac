"""Tests that a class is returned in order for any input, however often the buffer was full."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.lake import sorting
from pipeline.lake.sorting import ORDER, RowSorter

SCHEMA = pa.schema(
    [
        ("score", pa.float32()),
        ("image_id", pa.string()),
        ("regions", pa.list_(pa.struct([("x", pa.int32()), ("defect", pa.string())]))),
    ]
)


def rows(count: int, seed: int = 1) -> pa.Table:
    """Scores with many ties and some nulls, also negative ones; ids are hashes."""
    random = np.random.default_rng(seed)
    return pa.Table.from_pylist(
        [
            {
                "score": None if number % 11 == 0 else float(random.integers(-3, 20)) / 20,
                "image_id": hashlib.md5(f"{seed}-{number}".encode()).hexdigest(),
                "regions": [{"x": place, "defect": f"defect {number}"} for place in range(number % 3)],
            }
            for number in random.permutation(count)
        ],
        schema=SCHEMA,
    )


def sort_rows(folder: Path, parts: Iterator[tuple[str, pa.Table]], size: int = 100) -> dict[str, list[pa.Table]]:
    with RowSorter(folder / "rows.arrow", SCHEMA) as sorter:
        for class_name, table in parts:
            sorter.add(class_name, table)
        return {class_name: list(sorter.read(class_name, size)) for class_name in sorter.finish()}


@pytest.mark.parametrize(("buffer", "batch"), [(1 << 20, 512), (2000, 7), (1, 1), (5000, 64)])
def test_rows_come_back_as_one_sort_of_all_would_give_them(
    buffer: int, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorting, "_BUFFER_BYTES", buffer)
    monkeypatch.setattr(sorting, "_BATCH", batch)
    table = rows(1003)
    parts = [("nut", table.slice(start, 50)) for start in range(0, 1003, 50)]
    (found,) = sort_rows(tmp_path, iter(parts)).values()
    assert pa.concat_tables(found).equals(table.sort_by(ORDER).combine_chunks())
    assert [part.num_rows for part in found] == [100] * 10 + [3]
    assert all(column.num_chunks == 1 for part in found for column in part.columns)


def test_rows_with_the_same_key_stay_in_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids with the same first four characters, without a score; the whole id still orders them."""
    monkeypatch.setattr(sorting, "_BUFFER_BYTES", 1)
    ids = [f"{head}-{number:02}" for number in range(30) for head in ("aaaa", "bbbb")]
    table = pa.table({"score": [None] * 60, "image_id": ids, "regions": [[]] * 60}, schema=SCHEMA)
    parts = [("nut", table.slice(start, 7)) for start in range(0, 60, 7)]
    (found,) = sort_rows(tmp_path, iter(parts), size=20).values()
    assert [part.num_rows for part in found] == [30, 30]
    assert pa.concat_tables(found).column("image_id").to_pylist() == sorted(ids)


def test_runs_of_which_one_lies_wholly_before_the_others_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards come in the order of time: a line that breaks down has all its high scores in one run."""
    monkeypatch.setattr(sorting, "_BUFFER_BYTES", 1)
    monkeypatch.setattr(sorting, "_BATCH", 8)
    table = rows(400).sort_by(ORDER)
    parts = [("nut", table.slice(start, 100)) for start in (100, 0, 300, 200)]
    (found,) = sort_rows(tmp_path, iter(parts)).values()
    assert pa.concat_tables(found).equals(table.combine_chunks())


def test_classes_that_take_turns_are_told_apart_and_the_same_however_they_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorting, "_BUFFER_BYTES", 3000)
    tables = {name: rows(200, seed) for seed, name in enumerate(("bolt", "cap", "nut"), 1)}

    def parts(size: int) -> Iterator[tuple[str, pa.Table]]:
        for start in range(0, 200, size):
            for name, table in tables.items():
                yield name, table.slice(start, size)

    first, second = (sort_rows(tmp_path, parts(size)) for size in (10, 33))
    assert list(first) == ["bolt", "cap", "nut"]
    for name, table in tables.items():
        assert pa.concat_tables(first[name]).equals(table.sort_by(ORDER).combine_chunks())
        assert [left.equals(right) for left, right in zip(first[name], second[name], strict=True)] == [True] * 2
