"""Tests reading chosen rows and columns of a published class, with any row groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.lake import publish_night, read_groups, take_rows
from pipeline.storage import Store
from tests.lake.nights import ROWS, make_run


def test_rows_are_taken_in_the_order_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.lake.publish._ROWS_PER_GROUP", 7)
    output = Store(str(tmp_path))
    run, shards = make_run(output, "aaa")
    entry = publish_night(run, "m", run.shards, shards, output, "test").files[0]
    groups = list(read_groups(output, entry))
    whole = pa.concat_tables(groups)
    assert [group.num_rows for group in groups] == [7] * 5 + [5] and whole.num_rows == ROWS
    for places in ([], [39], [3, 38, 0, 14, 13, 3]):
        taken = take_rows(output, entry, np.asarray(places, np.int64))
        assert taken.to_pylist() == [whole.slice(place, 1).to_pylist()[0] for place in places]
    part = take_rows(output, entry, np.asarray([20, 1]), ["score", "image_uri"])
    assert part.column_names == ["score", "image_uri"]
    assert part.column("image_uri").to_pylist() == [whole.column("image_uri")[place].as_py() for place in (20, 1)]
