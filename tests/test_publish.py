"""Publishing under readers' eyes, and by several drivers at once."""

import hashlib
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import lake
from pipeline.publish import publish_night, read_commit
from pipeline.scoring import Run
from pipeline.storage import Store
from schemas.job import parse_job
from schemas.tables import SHARD

CLASSES = ("bolt", "nut")
ROWS = 40


def make_run(output: Store, name: str) -> tuple[Run, list[str]]:
    """A run whose shards lie in the store: rows of both classes, each with the run's id."""
    job = parse_job({"dataset": {"images": "x"}, "output": {"uri": output.uri("")}, "run_date": "2026-01-02"})
    run = Run(f"2026-01-02-{name}", job, "model", "0" * 64)
    shards = ["one", "two"]
    for shard in shards:
        rows = [
            {
                "class_name": class_name,
                "image_key": f"{shard}-{number}",
                "image_id": f"{shard}-{number}",
                "image_uri": f"{shard}-{number}",
                "run_id": run.run_id,
                "shard_id": shard,
                "status": "ok",
                "score": 0.5,
                "model": "model",
                "weights_sha256": "0" * 64,
                "scored_at": datetime(2026, 1, 2, tzinfo=timezone.utc),
            }
            for class_name in CLASSES
            for number in range(ROWS // 2)
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=SHARD), buffer)
        output.write(lake.shard_key(run.shards, shard), buffer.getvalue())
    return run, shards


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
            files = [output.read(entry["key"]) for entry in commit["files"]]
            assert [hashlib.sha256(data).hexdigest() for data in files] == [
                entry["sha256"] for entry in commit["files"]
            ]
            runs = set.union(*map(runs_in, files))
            assert len(files) == len(CLASSES) and runs == {commit["run_id"]}
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
    assert commit is not None and commit["rows"] == ROWS * len(CLASSES)
    for entry in commit["files"]:
        assert output.read(entry["table_key"]) == output.read(entry["key"])
        assert runs_in(output.read(entry["table_key"])) == {commit["run_id"]}
    assert len(list(output.list("scores"))) == len(CLASSES)
