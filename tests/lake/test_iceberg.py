"""Nights as snapshots of an Iceberg table, in the embedded catalog."""

from __future__ import annotations

import datetime
import logging
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.types import StringType

from pipeline.lake import iceberg, publish_night
from pipeline.storage import Run, Store
from tests.lake.nights import CLASSES, ROWS, job_for, make_run


def publish(output: Store, name: str, night: str = "2026-01-02") -> Run:
    run, shards = make_run(output, name, night=night)
    publish_night(run, "m1", run.shards, shards, output, name)
    return run


def rows_of(catalog: Catalog, table: str = "alfa.scores") -> list[tuple[str, str, str, int]]:
    database = catalog.load_table(table).scan().to_duckdb("scores")
    query = "SELECT run_date::VARCHAR, class_name, run_id, count(*) FROM scores GROUP BY ALL ORDER BY ALL"
    return database.execute(query).fetchall()


def night_of(run: Run, night: str = "2026-01-02") -> list[tuple[str, str, str, int]]:
    return [(night, name, run.run_id, ROWS) for name in CLASSES]


def test_a_night_is_replaced_in_one_snapshot_and_others_stay(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    job, catalog = job_for(output), iceberg.open_catalog(job_for(output))
    first, other = publish(output, "aaa"), publish(output, "ccc", "2026-01-03")
    iceberg.publish_snapshot(job, output, "test")
    iceberg.publish_snapshot(job_for(output, "2026-01-03"), output, "test")
    assert rows_of(catalog) == night_of(first) + night_of(other, "2026-01-03")
    second = publish(output, "bbb")
    iceberg.publish_snapshot(job, output, "test")
    assert rows_of(catalog) == night_of(second) + night_of(other, "2026-01-03")
    table = catalog.load_table("alfa.scores")
    # No snapshot in between shows a night that is missing or double.
    counts = [table.scan(snapshot_id=snapshot.snapshot_id).to_arrow().num_rows for snapshot in table.snapshots()]
    assert counts == [2 * ROWS, 4 * ROWS, 4 * ROWS]
    assert table.schema().find_field("score").doc == iceberg.SCHEMA.field("score").metadata[b"doc"].decode()
    database = table.scan("run_date = '2026-01-03'").to_duckdb("night")
    assert database.execute("SELECT count(*) FROM night").fetchall() == [(2 * ROWS,)]


def test_publishing_the_same_commit_again_changes_nothing(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    job = job_for(output)
    run = publish(output, "aaa")
    for _ in range(2):
        iceberg.publish_snapshot(job, output, "test")
    table = iceberg.open_catalog(job).load_table("alfa.scores")
    (snapshot,) = table.snapshots()
    assert snapshot.summary is not None
    assert snapshot.summary["alfa.run_id"] == run.run_id and snapshot.summary["alfa.manifest"] == "m1"
    # Back to a run that was published before the last one: its older snapshot does not count.
    publish(output, "bbb")
    iceberg.publish_snapshot(job, output, "test")
    publish(output, "aaa")
    iceberg.publish_snapshot(job, output, "test")
    assert rows_of(iceberg.open_catalog(job)) == night_of(run)


def test_an_older_table_gets_the_columns_that_it_lacks_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Store(str(tmp_path))
    older = pa.schema([field for field in iceberg.SCHEMA if field.name not in ("mask_area", "map_uri")])
    publish(output, "aaa")
    with monkeypatch.context() as patch:
        patch.setattr(iceberg, "SCHEMA", older)
        iceberg.publish_snapshot(job_for(output), output, "test")
    publish(output, "bbb", "2026-01-03")
    iceberg.publish_snapshot(job_for(output, "2026-01-03"), output, "test")
    table = iceberg.open_catalog(job_for(output)).load_table("alfa.scores").scan().to_arrow()
    assert {"mask_area", "map_uri"} <= set(table.column_names) and table.num_rows == 4 * ROWS
    assert set(table.column("run_date").to_pylist()) == {datetime.date(2026, 1, 2), datetime.date(2026, 1, 3)}


def test_who_is_overtaken_by_another_night_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Store(str(tmp_path))
    first, other = publish(output, "aaa"), publish(output, "ccc", "2026-01-03")
    iceberg.publish_snapshot(job_for(output), output, "test")
    publish(output, "bbb")
    real, overtaken = iceberg._write_file, []

    def slowly(*arguments: object) -> str:
        if not overtaken:
            overtaken.append(True)
            iceberg.publish_snapshot(job_for(output, "2026-01-03"), output, "other")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(iceberg, "_write_file", slowly)
    iceberg.publish_snapshot(job_for(output), output, "test")
    shown = rows_of(iceberg.open_catalog(job_for(output)))
    assert len(shown) == 4 and shown[2:] == night_of(other, "2026-01-03") and first.run_id not in str(shown)


def test_what_another_engine_did_to_the_table_stays(tmp_path: Path) -> None:
    """A column more, rows deleted, files rewritten: the nights that come after add their rows, and take none."""
    output = Store(str(tmp_path))
    publish(output, "aaa")
    iceberg.publish_snapshot(job_for(output), output, "test")
    catalog = iceberg.open_catalog(job_for(output))
    table = catalog.load_table("alfa.scores")
    with table.update_schema() as schema:
        schema.add_column("seen_by", StringType())
    table.delete("image_id = 'one-0'")  # a photo of each class
    rows = table.scan().to_arrow()
    seen = rows.set_column(rows.column_names.index("seen_by"), "seen_by", pa.array(["Ada"] * len(rows)))
    table.overwrite(seen)
    assert len(rows) == 2 * ROWS - 2

    publish(output, "ccc", "2026-01-03")
    for night in ("2026-01-03", "2026-01-02"):
        iceberg.publish_snapshot(job_for(output, night), output, "test")
    database = catalog.load_table("alfa.scores").scan().to_duckdb("scores")
    query = "SELECT run_date::VARCHAR, seen_by, count(*) FROM scores GROUP BY ALL ORDER BY ALL"
    assert database.execute(query).fetchall() == [
        ("2026-01-02", "Ada", 2 * ROWS - 2),
        ("2026-01-03", None, 2 * ROWS),
    ]
    last = publish(output, "bbb")
    iceberg.publish_snapshot(job_for(output), output, "test")
    assert rows_of(catalog)[:2] == night_of(last)


def test_nights_that_are_published_at_once_are_there_once_each(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    nights = [f"2026-01-0{number}" for number in range(1, 5)]
    runs = {night: publish(output, "aaa", night) for night in nights}
    barrier = threading.Barrier(len(nights))

    def publish_one(night: str) -> None:
        barrier.wait()
        iceberg.publish_snapshot(job_for(output, night), output, night)

    with ThreadPoolExecutor(len(nights)) as pool:
        list(pool.map(publish_one, nights))
    expected = [row for night in nights for row in night_of(runs[night], night)]
    assert rows_of(iceberg.open_catalog(job_for(output))) == expected


def test_a_catalog_that_is_away_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = Store(str(tmp_path))
    runs = publish(output, "aaa"), publish(output, "ccc", "2026-01-03")
    iceberg.publish_snapshot(job_for(output), output, "test")
    catalog = sqlite3.connect(tmp_path / "iceberg" / "catalog.db", check_same_thread=False)
    catalog.execute("BEGIN EXCLUSIVE")

    class Back(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "does not answer or is busy" in record.getMessage():
                catalog.rollback()

    handler = Back()
    logging.getLogger("pipeline.lake.iceberg").addHandler(handler)
    try:
        iceberg.publish_snapshot(job_for(output, "2026-01-03"), output, "test")
    finally:
        logging.getLogger("pipeline.lake.iceberg").removeHandler(handler)
        catalog.close()
    assert "database is locked" in caplog.text
    assert rows_of(iceberg.open_catalog(job_for(output))) == night_of(runs[0]) + night_of(runs[1], "2026-01-03")


@pytest.mark.parametrize(
    ("uri", "lake", "message"),
    [
        ("memory://lake", {}, "lake.catalog is required for memory://"),
        ("{}", {"catalog": "nowhere"}, "PYICEBERG_CATALOG__NOWHERE__URI"),
    ],
)
def test_a_catalog_that_cannot_be_had_is_one_clear_error(
    tmp_path: Path, uri: str, lake: dict[str, str], message: str
) -> None:
    with pytest.raises(iceberg.LakeError, match=message):
        iceberg.open_catalog(job_for(Store(uri.format(tmp_path)), **lake))


def test_a_table_that_is_not_partitioned_by_night_is_left_alone(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    publish(output, "aaa")
    catalog = iceberg.open_catalog(job_for(output))
    catalog.create_namespace("alfa")
    catalog.create_table("alfa.scores", iceberg.SCHEMA)
    with pytest.raises(iceberg.LakeError, match="not partitioned by run_date"):
        iceberg.publish_snapshot(job_for(output), output, "test")
