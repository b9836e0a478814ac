"""The cookbook of pipeline/lake/README.md: every snippet is taken from it and run, on a lake of two nights."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from pipeline.lake import iceberg, publish_night, render_ddl
from pipeline.storage import Store
from tests.command import alfa
from tests.lake.nights import CLASSES, ODD, ROWS, job_for, make_run, odd_partitions
from tests.lake.nights import publish as publish_photos
from tests.places import ROOT
from tests.shared_ray import share_ray

PAGE = "pipeline/lake/README.md"
SECTION = (ROOT / PAGE).read_text().partition("\n## Cookbook\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", SECTION, re.DOTALL)
PYTHON = {code.splitlines()[0].strip("# ").split()[0].strip(",;"): code for kind, code in BLOCKS if kind == "python"}
NIGHTS = ("2026-01-01", "2026-01-02")
ABOVE = 14 * 2 * len(CLASSES)
"""Of the scores 0.895 to 0.914 of both shards, those above 0.9."""


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lake")
    output = Store(str(folder))
    for night in NIGHTS:
        run, shards = make_run(output, "aaa", 0.895, night)
        publish_night(run, "m", run.shards, shards, output, "test")
        iceberg.publish_snapshot(job_for(output, night), output, "test")
    return folder


@pytest.fixture(scope="module")
def odd_lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    output = Store(str(folder))
    run, shards = make_run(output, "aaa", 0.895, NIGHTS[1], ODD)
    commit = publish_night(run, "m", run.shards, shards, output, "test")
    assert [entry.class_name for entry in commit.files] == sorted(ODD)
    return folder


def check_classes(names: Iterable[Any]) -> None:
    """Every class is there, as text; the one that readers take for null goes by another name."""
    assert set(names) == odd_partitions()


def run_python(code: str, lake: Path) -> Any:
    names: dict[str, Any] = {}
    exec(compile(code.replace("s3://lake/inspection", str(lake)), PAGE, "exec"), names)
    return names["rows"]


def check(rows: Any) -> None:
    assert len(rows) == ABOVE


def test_the_section_has_a_snippet_for_every_reader() -> None:
    assert list(PYTHON) == ["What", "pandas", "pyarrow", "Polars", "Ray", "Iceberg"]


@pytest.mark.parametrize("reader", ["What", "pandas", "pyarrow", "Polars"])
def test_python_snippets_read_the_night(reader: str, lake: Path) -> None:
    check(run_python(PYTHON[reader], lake))


@pytest.mark.parametrize("reader", ["What", "pandas", "pyarrow", "Polars"])
def test_python_snippets_tell_odd_classes_apart(reader: str, odd_lake: Path) -> None:
    rows = run_python(PYTHON[reader], odd_lake)
    names = {"What": lambda: rows.df()["class_name"], "pyarrow": lambda: rows["class_name"].to_pylist()}
    check_classes(names.get(reader, lambda: rows["class_name"])())


def test_sql_snippets_tell_odd_classes_apart(odd_lake: Path) -> None:
    (sql,) = (code for kind, code in BLOCKS if kind == "sql")
    (readme,) = re.findall(r"```sql\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    statements = [*sql.replace("is_anomalous", "true").split(";"), re.sub(r"WHERE is_anomalous|LIMIT 10", "", readme)]
    for statement in filter(None, (part.strip().rstrip(";") for part in statements)):
        if "PARTITION BY image_uri" not in statement:  # the photos of make_run are the same in all classes
            placed = statement.replace("s3://lake/inspection", str(odd_lake)).replace("out/demo", str(odd_lake))
            check_classes(row[0] for row in duckdb.sql(f"SELECT class_name FROM ({placed})").fetchall())


def test_the_duckdb_view_tells_odd_classes_apart(odd_lake: Path) -> None:
    database = duckdb.connect()
    database.execute(render_ddl("duckdb", str(odd_lake)))
    check_classes(row[0] for row in database.sql("SELECT class_name FROM scores").fetchall())


def test_the_iceberg_snippet_reads_the_night(lake: Path) -> None:
    """In a process of its own: pyiceberg looks at the environment once."""
    catalog = {"TYPE": "sql", "URI": f"sqlite:///{lake}/iceberg/catalog.db"}
    environment = {f"PYICEBERG_CATALOG__ALFA__{key}": value for key, value in catalog.items()}
    code = f"{PYTHON['Iceberg']}\nprint(len(rows))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == ABOVE


@pytest.mark.slow
def test_the_ray_snippet_reads_the_night(lake: Path, odd_lake: Path) -> None:
    share_ray()
    check(run_python(PYTHON["Ray"], lake))
    check_classes(run_python(PYTHON["Ray"], odd_lake)["class_name"])


def test_sql_snippets_give_the_night_the_last_night_and_each_image_once(lake: Path) -> None:
    (sql,) = (code for kind, code in BLOCKS if kind == "sql")
    night, last, once = (
        duckdb.sql(statement).fetchall()
        for statement in sql.replace("s3://lake/inspection", str(lake)).split(";")
        if statement.strip()
    )
    assert night == []  # none of the rows is called anomalous
    assert len(last) == ROWS * len(CLASSES) and all(f"{NIGHTS[1]}-aaa" in row for row in last)
    images = ROWS  # both classes of make_run share their image ids
    assert len(once) == images and all(f"{NIGHTS[1]}-aaa" in row for row in once)


@pytest.mark.parametrize("select", ["all", "new"])
def test_the_state_of_every_photo_is_its_last_row(select: str, tmp_path: Path) -> None:
    """Three nights: a and b, of which b is an error; then a has changed and c has come; then b has gone."""
    output = Store(str(tmp_path))
    a, b, c, changed = ("a", "v1"), ("b", "v1"), ("c", "v1"), ("a", "v2")
    nights = {
        "all": [{a: "ok", b: "error"}, {changed: "ok", b: "ok", c: "ok"}, {changed: "ok", c: "ok"}],
        "new": [{a: "ok", b: "error"}, {changed: "ok", b: "ok", c: "ok"}, {}],
    }[select]
    for number, photos in enumerate(nights, 1):
        publish_photos(output, f"2026-01-0{number}", photos)
    (sql,) = (code for kind, code in BLOCKS if kind == "sql")
    *_, state = (part for part in sql.replace("s3://lake/inspection", str(tmp_path)).split(";") if part.strip())
    rows = duckdb.sql(f"SELECT image_uri, image_etag, status, run_date::VARCHAR FROM ({state}) ORDER BY 1").fetchall()
    last = "2026-01-03" if select == "all" else "2026-01-02"
    assert rows == [("a", "v2", "ok", last), ("b", "v1", "ok", "2026-01-02"), ("c", "v1", "ok", last)]


def test_the_query_of_the_readme_lists_what_is_anomalous(lake: Path) -> None:
    (query,) = re.findall(r"```sql\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert duckdb.sql(query.replace("out/demo", str(lake))).columns == [
        "class_name", "score", "image_uri", "defect", "mask_uri"
    ]  # fmt: skip
    called = query.replace("out/demo", str(lake)).replace("WHERE is_anomalous", "WHERE score > 0.9")
    scores = [row[1] for row in duckdb.sql(called).fetchall()]
    assert len(scores) == 10 and scores == sorted(scores, reverse=True)


def test_the_command_prints_ddl() -> None:
    (command,) = (code for kind, code in BLOCKS if kind == "bash")
    program, *arguments = shlex.split(command, comments=True)
    printed = alfa(*arguments)
    assert program == "alfa" and printed.returncode == 0
    assert "CREATE EXTERNAL TABLE" in printed.stdout and "'s3://lake/inspection/scores/'" in printed.stdout
