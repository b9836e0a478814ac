"""Tests three nights of a bucket on a real S3, each of which scores only new photos."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.lake import (
    Retention,
    State,
    check_ledger,
    collect_garbage,
    find_ledgers,
    published_nights,
    read_commit,
)
from pipeline.storage import Store
from tests.command import alfa_alone
from tests.lake.nights import left, photos_named, publish
from tests.nights import FIRST, SECOND, THIRD
from tests.places import DEMO
from tests.seaweed import ObjectStorage

PHOTOS = sorted(DEMO.glob("hazelnut/test/*/*.jpg"))


def score(night: str, *overrides: str) -> str:
    """Runs a night; what it logs and prints."""
    wanted = ("dataset.select=new", "engine.shard_size=2", "engine.max_error_rate=1", *overrides)
    sets = [part for override in wanted for part in ("--set", override)]
    where = ("--images", "s3://lake/arriving", "--output", "s3://lake/incremental")
    done = alfa_alone("score", *where, "--run-date", night, *sets)
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def names_of(night: str) -> list[str]:
    output = Store("s3://lake/incremental")
    files = [pa.BufferReader(output.read(info.key)) for info in output.list(f"scores/run_date={night}")]
    return sorted(uri.rpartition("/")[2] for file in files for uri in pq.read_table(file)["image_uri"].to_pylist())


@pytest.mark.slow
def test_nights_with_arrivals_changes_and_removals(s3: ObjectStorage, tmp_path: Path) -> None:
    bucket, output = Store("s3://lake/arriving"), Store("s3://lake/incremental")
    for name, photo in zip(("a", "b", "c"), PHOTOS, strict=False):
        bucket.write(f"hazelnut/{name}.jpg", photo.read_bytes())
    bucket.write("hazelnut/broken.jpg", b"broken")
    assert "4 images listed: 0 were scored in another night" in score(FIRST)
    assert names_of(FIRST) == ["a.jpg", "b.jpg", "broken.jpg", "c.jpg"]

    bucket.write("hazelnut/a.jpg", PHOTOS[3].read_bytes())
    bucket.write("hazelnut/d.jpg", PHOTOS[4].read_bytes())
    bucket.delete("hazelnut/b.jpg")
    assert "4 images listed: 1 were scored in another night" in score(SECOND)
    assert names_of(SECOND) == ["a.jpg", "broken.jpg", "d.jpg"]

    last = score(THIRD, "dataset.retry_nights=1")
    assert "4 images listed: 3 were scored in another night, 1 failed in 2 nights and are given up" in last
    commit = read_commit(output, THIRD)
    assert commit is not None and commit.rows == 0 and names_of(THIRD) == []
    assert re.search(r"rate  nothing was left to score", last)

    for night in (FIRST, SECOND, THIRD):
        for info in output.list(f"scores/run_date={night}"):
            path = tmp_path / info.key
            path.parent.mkdir(parents=True)
            path.write_bytes(output.read(info.key))
    rows = f"read_parquet('{tmp_path}/scores/**/*.parquet', hive_partitioning = true)"
    state = duckdb.sql(
        f"SELECT parse_filename(image_uri), status, run_date::VARCHAR FROM {rows} "
        f"QUALIFY row_number() OVER (PARTITION BY image_uri ORDER BY run_date DESC) = 1 ORDER BY 1"
    ).fetchall()
    assert state == [
        ("a.jpg", "ok", SECOND),
        ("b.jpg", "ok", FIRST),
        ("broken.jpg", "error", SECOND),
        ("c.jpg", "ok", FIRST),
        ("d.jpg", "ok", SECOND),
    ]
    rebuilt = alfa_alone("ledger", "s3://lake/incremental", "--rebuild")
    assert rebuilt.returncode == 0 and "3 nights were made anew from their rows: no difference" in rebuilt.stdout


def test_old_nights_lose_their_shards_on_s3_or_go_as_a_whole(s3: ObjectStorage) -> None:
    output, nights = Store("s3://lake/retention"), (FIRST, SECOND, THIRD)
    for night, photo in zip(nights, photos_named("a", "b", "c"), strict=True):
        publish(output, night, {photo: "ok"})
    cut = date.fromisoformat(THIRD)
    in_an_hour = -3600  # what is there is older than that
    removed = list(collect_garbage(output, in_an_hour, delete=True, retention=Retention(cut)))
    assert sorted(item.key[:15] for item in removed if item.kind == "shards") == [f"runs/{FIRST}", f"runs/{SECOND}"]
    commits = [read_commit(output, night) for night in nights]
    assert [commit is not None and commit.cleared_at is not None for commit in commits] == [True, True, False]
    assert left(output, photos_named("a", "b", "c", "d")) == photos_named("d")
    assert [check_ledger(output, ledger) for ledger in find_ledgers(output)] == [State.WHOLE] * 3
    list(collect_garbage(output, in_an_hour, delete=True, retention=Retention(cut, table=True)))
    assert published_nights(output) == [THIRD] and all(THIRD in info.key for info in output.list("scores"))
    assert left(output, photos_named("a", "b", "c")) == photos_named("a", "b")
