"""Tests publishing while readers read, and by several drivers at once."""

import hashlib
import io
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.lake import publish_night, read_commit
from pipeline.storage import Run, Store, leases, paths
from schemas.tables import SCHEMA_VERSION
from tests.lake.nights import CLASSES, ROWS, make_run


def runs_in(data: bytes) -> set[str]:
    table = pq.read_table(io.BytesIO(data), columns=["run_id", "image_id"])
    assert len(set(table.column("image_id").to_pylist())) == table.num_rows == ROWS
    return set(table.column("run_id").to_pylist())


def test_readers_that_poll_see_the_old_night_or_the_new_one(tmp_path: Path) -> None:
    output, over = Store(str(tmp_path)), threading.Event()
    first, second = make_run(output, "first"), make_run(output, "second")
    publish_night(first[0], "m", first[0].shards, first[1], output, "first")
    seen: set[str] = set()

    def follow_commit() -> int:
        reads = 0
        while not over.is_set():
            commit = read_commit(output, "2026-01-02")
            assert commit is not None
            files = [output.read(entry.key) for entry in commit.files]
            assert [hashlib.sha256(data).hexdigest() for data in files] == [entry.sha256 for entry in commit.files]
            runs = set.union(*map(runs_in, files))
            assert len(files) == len(CLASSES) and runs == {commit.run_id}
            seen.update(runs)
            reads += 1
        return reads

    def follow_glob() -> int:
        reads = 0
        while not over.is_set():
            for class_name in CLASSES:
                files = list(output.list(f"scores/run_date=2026-01-02/class_name={class_name}"))
                assert len(files) == 1 and len(runs_in(output.read(files[0].key))) == 1
            reads += 1
        return reads

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(follow_commit), pool.submit(follow_glob)]
        try:
            for run, shards in [second, first] * 5:
                publish_night(run, "m", run.shards, shards, output, "writer")
        finally:
            over.set()
        assert all(reader.result() > 5 for reader in readers)
    assert seen == {first[0].run_id, second[0].run_id}


def test_files_say_where_they_come_from_and_statistics_skip_what_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Store(str(tmp_path))
    run, shards = make_run(output, "first")
    monkeypatch.setattr("pipeline.lake.publish._ROWS_PER_GROUP", 10)
    entry = publish_night(run, "m", run.shards, shards, output, "first").files[0]
    file = pq.ParquetFile(io.BytesIO(output.read(entry.key)))
    facts = {key.decode(): value.decode() for key, value in file.metadata.metadata.items()}
    assert {key: facts[key] for key in facts if key.startswith("alfa.") or key == "schema_version"} == {
        "schema_version": str(SCHEMA_VERSION),
        "alfa.run_id": "2026-01-02-first",
        "alfa.model": "model",
        "alfa.weights_sha256": "0" * 64,
        "alfa.prompt_fingerprint": "p1",
        "alfa.config_hash": run.job.config_fingerprint,
    }
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    columns = [{group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)} for group in groups]
    scores = [column["score"] for column in columns]
    assert len(groups) == ROWS // 10 and all(column.compression == "ZSTD" for column in scores)
    assert all(column.statistics.has_min_max and column.has_column_index for column in scores)
    edges = [(column.statistics.min, column.statistics.max) for column in scores]
    assert all(above[0] >= below[1] for above, below in itertools.pairwise(edges)) and edges[0][0] > edges[-1][1]
    assert {(column["status"].statistics.min, column["status"].statistics.max) for column in columns} == {("ok", "ok")}


def test_publishing_the_same_shards_again_writes_no_file_that_a_commit_named(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    run, shards = make_run(output, "first")
    first = publish_night(run, "m", run.shards, shards, output, "first")
    written = {entry.key: output.version(entry.key) for entry in first.files}
    second = publish_night(run, "m", run.shards, shards, output, "first")
    assert second.files == first.files
    assert {entry.key: output.version(entry.key) for entry in second.files} == written
    make_run(output, "first", score=0.9)  # scored anew: other rows, other files
    third = publish_night(run, "m", run.shards, shards, output, "first")
    assert not written.keys() & {entry.key for entry in third.files}
    assert {key: output.version(key) for key in written} == written


@pytest.mark.parametrize("asleep_before", ["scores/run_date=2026-01-02/class_name=nut", "commits/"])
def test_a_publisher_that_slept_through_another_ones_commit_writes_nothing_more(
    tmp_path: Path, asleep_before: str
) -> None:
    """It falls asleep right before it writes, after its lease has been checked: the store alone can stop it then."""
    sleepy = SleepyStore(str(tmp_path))
    base, late, early = (make_run(sleepy, name) for name in ("base", "late", "early"))
    publish_night(base[0], "m", base[0].shards, base[1], sleepy, "base")
    sleepy.before = asleep_before
    sleepy.meanwhile = lambda: publish_as_successor(Store(str(tmp_path)), *early)
    with pytest.raises(leases.LeaseLostError):
        publish_night(late[0], "m", late[0].shards, late[1], sleepy, "late")
    commit = read_commit(sleepy, "2026-01-02")
    assert commit is not None and commit.run_id == early[0].run_id
    for entry in commit.files:
        assert runs_in(sleepy.read(entry.table_key)) == {early[0].run_id}


class SleepyStore(Store):
    """Lets something happen once, right before an object below a prefix is replaced."""

    before, meanwhile = "nothing", staticmethod(lambda: None)

    def replace(self, key: str, data: bytes, version: str | None) -> bool:
        if key.startswith(self.before):
            self.before = "nothing"
            self.meanwhile()
        return super().replace(key, data, version)


def publish_as_successor(output: Store, run: Run, shards: list[str]) -> None:
    """Publishes as one does who finds the lease of the sleeper run out."""
    lease = leases.lease_key(paths.night_lease(run.job.run_date), 2)
    output.write(lease, json.dumps({"owner": "sleeper", "expires_at": 0.0}).encode())
    publish_night(run, "m", run.shards, shards, output, "early")


@pytest.mark.parametrize("attempt", range(3))
def test_two_that_publish_one_night_take_turns(tmp_path: Path, attempt: int) -> None:
    output, start = Store(str(tmp_path)), threading.Barrier(2)
    runs = [make_run(output, name) for name in ("first", "second")]

    def publish(number: int) -> None:
        run, shards = runs[number]
        start.wait()
        publish_night(run, "m", run.shards, shards, Store(str(tmp_path)), f"driver {number}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(publish, range(2)))
    commit = read_commit(output, "2026-01-02")
    assert commit is not None and commit.rows == ROWS * len(CLASSES)
    for entry in commit.files:
        assert output.read(entry.table_key) == output.read(entry.key)
        assert runs_in(output.read(entry.table_key)) == {commit.run_id}
    assert len(list(output.list("scores"))) == len(CLASSES)
