"""The DDL that `alfa schema` prints: run by DuckDB, parsed as Athena and Spark would."""

import datetime
from pathlib import Path

import duckdb
import pytest
import sqlglot
from sqlglot import exp

from pipeline.lake import publish_night, render_ddl
from pipeline.lake.ddl import PARTITIONS
from pipeline.storage import Store
from schemas.tables import SCORES
from tests.command import alfa
from tests.lake.nights import ROWS, make_run

COLUMNS = [*SCORES.names, *PARTITIONS.names]


def test_duckdb_runs_it_and_knows_types_and_comments(tmp_path: Path) -> None:
    output = Store(str(tmp_path / "o'lake"))
    run, shards = make_run(output, "aaa")
    publish_night(run, "m", run.shards, shards, output, "test")
    printed = alfa("schema", "--dialect", "duckdb", "--output", tmp_path / "o'lake")
    assert printed.returncode == 0, printed.stderr
    database = duckdb.connect()
    database.execute(printed.stdout)
    assert database.sql("SELECT run_date, class_name, count(*) FROM scores GROUP BY ALL ORDER BY ALL").fetchall() == [
        (datetime.date(2026, 1, 2), "bolt", ROWS),
        (datetime.date(2026, 1, 2), "nut", ROWS),
    ]
    described = database.sql("SELECT column_name, comment FROM duckdb_columns() WHERE table_name = 'scores'").fetchall()
    assert [name for name, _ in described] == COLUMNS
    assert dict(described)["score"] == SCORES.field("score").metadata[b"doc"].decode()
    assert database.sql("SELECT regions[1].peak FROM scores LIMIT 1").fetchall() == [(None,)]


@pytest.mark.parametrize("dialect", ["athena", "spark"])
def test_other_engines_parse_it(dialect: str) -> None:
    create, repair = sqlglot.parse(
        render_ddl(dialect, "s3://lake/o'lake/"), dialect=dialect, error_level=sqlglot.ErrorLevel.RAISE
    )
    assert isinstance(create, exp.Create)
    columns = {
        column.name: column for column in create.find_all(exp.ColumnDef) if column.find(exp.CommentColumnConstraint)
    }
    assert sorted(columns) == sorted(COLUMNS)
    kinds = {name: column.args["kind"].sql("hive").replace(" ", "").lower() for name, column in columns.items()}
    assert (kinds["score"], kinds["scored_at"], kinds["run_date"]) == ("float", "timestamp", "date")
    assert kinds["regions"].startswith("array<struct<x:int,y:int,width:int,height:int,area:bigint,peak:float")
    (location,) = create.find_all(exp.LocationProperty)
    assert location.this.this.rstrip("/") == "s3://lake/o'lake/scores"
    assert "repair table scores" in repair.sql(dialect).lower()


def test_an_unknown_dialect_is_bad_usage() -> None:
    refused = alfa("schema", "--dialect", "oracle")
    assert refused.returncode == 2
    assert "'oracle' is not one of 'athena', 'spark', 'duckdb'" in refused.stderr
