"""The scores table in a real Spark, by the DDL that `alfa schema --dialect spark` prints."""

from __future__ import annotations

import datetime
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.lake import publish_night, render_ddl
from pipeline.storage import Store
from tests.lake.nights import ODD, ROWS, make_run, odd_partitions

NIGHTS = ("2026-01-01", "2026-01-02")
REGION = {"x": 3, "y": 4, "width": 5, "height": 6, "area": 30, "peak": 0.75, "defect": "crack", "peer_uri": "a"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("java") is None, reason="Spark needs Java: apt-get install openjdk-17-jre-headless"
    ),
]


@pytest.fixture
def spark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    sql = pytest.importorskip("pyspark.sql", reason="pip install pyspark; it is no part of the dev extra, being 430 MB")
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    settings = {
        "spark.ui.enabled": "false",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.shuffle.partitions": "1",
        "spark.sql.maxMetadataStringLength": "10000",
        "spark.sql.debug.maxToStringFields": "1000",
        "spark.sql.warehouse.dir": str(tmp_path / "warehouse"),
    }
    builder = sql.SparkSession.builder.master("local[1]")
    for name, value in settings.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    try:
        yield session
    finally:
        session.stop()


def publish(lake: Path, night: str) -> None:
    output = Store(str(lake))
    run, shards = make_run(output, "aaa", 0.895, night, ODD, regions=[REGION, {**REGION, "peak": 0.25}])
    publish_night(run, "m", run.shards, shards, output, "test")


def test_spark_reads_the_table_that_it_is_told(spark: Any, tmp_path: Path) -> None:
    lake = tmp_path / "o'lake"
    publish(lake, NIGHTS[0])
    create, repair = (part for part in render_ddl("spark", f"file://{lake}").split(";\n") if part.strip())
    for statement in (create, repair):
        spark.sql(statement)
    counts = {
        row.class_name: row.rows
        for row in spark.sql("SELECT class_name, count(*) rows FROM scores GROUP BY 1").collect()
    }
    assert counts == dict.fromkeys(odd_partitions(), ROWS)

    publish(lake, NIGHTS[1])
    assert spark.sql("SELECT 1 FROM scores").count() == ROWS * len(ODD)  # Spark knows of a night when it is told
    spark.sql(repair)
    assert spark.sql("SELECT 1 FROM scores").count() == 2 * ROWS * len(ODD)

    columns = "*, CAST(scored_at AS STRING) at, input_file_name() file"
    night = spark.sql(f"SELECT {columns} FROM scores WHERE run_date = DATE'2026-01-02' AND class_name = '001'")
    plan = night._jdf.queryExecution().executedPlan().toString()
    (filters,) = re.findall(r"PartitionFilters: \[(.*?)\]", plan)
    assert "run_date" in filters and "class_name" in filters
    rows = night.collect()
    assert len(rows) == ROWS
    assert {row.file.partition("/scores/")[2] for row in rows} == {
        "run_date=2026-01-02/class_name=001/part-00000.parquet"
    }
    assert {(row.run_date, row.class_name, row.at) for row in rows} == {
        (datetime.date(2026, 1, 2), "001", "2026-01-02 00:00:00")
    }
    assert [region.asDict() for region in rows[0].regions] == [REGION, {**REGION, "peak": 0.25}]

    above = spark.sql(
        "SELECT regions[0].defect defect, score FROM scores WHERE score > 0.9 AND run_date = DATE'2026-01-01'"
    )
    assert above.count() == 14 * 2 * len(ODD)  # of the scores 0.895 to 0.914 of both shards, those above 0.9
    assert {row.defect for row in above.collect()} == {"crack"}
