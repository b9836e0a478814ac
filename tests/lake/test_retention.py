"""Tests `alfa gc --keep-nights` and `--keep-days`: what is removed of old nights, and that the rest stays valid."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import duckdb
import pytest
from rich.console import Console
from typer.testing import CliRunner

from jobs.cli import app
from jobs.export import run_export
from jobs.gc import run_gc
from jobs.ledger import run_ledger
from jobs.status import read_status
from pipeline.lake import (
    ExportError,
    Retention,
    collect_garbage,
    find_oldest_kept,
    iceberg,
    publish_night,
    published_nights,
    read_commit,
    read_groups,
)
from pipeline.report import drift
from pipeline.storage import Store, leases, paths
from schemas.job import Storage, dump_job_yaml
from tests.killed_driver import kill_around
from tests.lake.nights import DAY_S, METHOD, age, job_for, keys, left, make_run, photos_named, publish
from tests.nights import FIRST, FOURTH, SECOND, THIRD
from tests.stats import write_stats

NIGHTS = (FIRST, SECOND, THIRD)
CUT = Retention(date.fromisoformat(THIRD))
WHOLE = Retention(date.fromisoformat(THIRD), table=True)


def make_lake(output: Store) -> dict[str, str]:
    """Three nights of a photo each, with all that runs leave. Returns their run ids."""
    runs = {}
    for night, photo in zip(NIGHTS, photos_named("a", "b", "c"), strict=True):
        commit = publish(output, night, {photo: "ok"})
        runs[night] = commit.run_id
        version = paths.mask_version(commit.run_id)
        output.write(paths.mask_key(date.fromisoformat(night), version, "nut", "a"), b"mask")
        output.write(paths.map_key(date.fromisoformat(night), version, "nut", "a"), b"map")
        output.write(paths.manifest_key(commit.run_id, commit.manifest), b"manifest")
        output.write(paths.memory_key(commit.run_id, "nut"), b"patches")
        output.write(paths.report_key(commit.run_id), b"report")
        output.write(paths.run_key(commit.run_id, "job.yaml"), b"dataset: {images: x}\noutput: {uri: y}\n")
        write_stats(output, commit.run_id, scoring_images_per_second=5.0)
    return runs


def without_leases(names: Iterable[str]) -> set[str]:
    return {name for name in names if ".claim-" not in name}


def is_cleared(output: Store, night: str) -> bool:
    commit = read_commit(output, night)
    return commit is not None and commit.cleared_at is not None


def rows_by_glob(folder: Path) -> list[tuple[str, str]]:
    table = f"read_parquet('{folder}/scores/**/*.parquet', hive_partitioning = true)"
    return duckdb.sql(f"SELECT run_date::VARCHAR, image_uri FROM {table} ORDER BY ALL").fetchall()


def rows_by_commits(output: Store) -> list[tuple[str, str]]:
    commits = [commit for night in published_nights(output) if (commit := read_commit(output, night))]
    return [
        (str(commit.run_date), row["image_uri"])
        for commit in commits
        for entry in commit.files
        for rows in read_groups(output, entry)
        for row in rows.to_pylist()
    ]


def test_the_oldest_night_that_is_kept(tmp_path: Path) -> None:
    output, today = Store(str(tmp_path)), date(2026, 1, 4)
    assert find_oldest_kept(output, keep_nights=1, today=today) is None
    for night in (FIRST, THIRD):
        publish(output, night, {})
    first, third = date.fromisoformat(FIRST), date.fromisoformat(THIRD)
    assert find_oldest_kept(output, keep_nights=1, today=today) == third
    assert find_oldest_kept(output, keep_nights=2, today=today) is None
    assert find_oldest_kept(output, keep_nights=9, today=today) is None
    assert find_oldest_kept(output, keep_days=2, today=today) == date(2026, 1, 3)
    assert find_oldest_kept(output, keep_days=3, today=today) == date(2026, 1, 2)
    assert find_oldest_kept(output, keep_days=4, today=today) is None  # the first night is the fourth day
    assert find_oldest_kept(output, keep_days=1, today=date(2027, 1, 1)) == third  # the last night stays
    assert first < third


def test_old_nights_lose_masks_maps_and_shards_and_keep_their_rows(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    runs = make_lake(output)
    age(tmp_path)
    before, rows = keys(output), rows_by_glob(tmp_path)
    expected = list(collect_garbage(output, DAY_S, delete=False, retention=CUT))
    assert keys(output) == before and not is_cleared(output, FIRST)
    removed = list(collect_garbage(output, DAY_S, delete=True, retention=CUT))
    assert set(removed) == set(expected) and len(set(removed)) == len(removed)
    old = (runs[FIRST], runs[SECOND])
    assert before - keys(output) == {item.key for item in removed}
    assert [is_cleared(output, night) for night in NIGHTS] == [True, True, False]
    assert {item.key for item in removed if item.kind != "leases"} == {
        *(paths.shard_key(f"runs/{run}/shards", "one") for run in old),
        *(paths.manifest_key(run, "m") for run in old),
        *(paths.memory_key(run, "nut") for run in old),
        *(paths.mask_key(date.fromisoformat(run[:10]), run[11:], "nut", "a") for run in old),
        *(paths.map_key(date.fromisoformat(run[:10]), run[11:], "nut", "a") for run in old),
    }
    assert list(collect_garbage(output, DAY_S, delete=True, retention=CUT)) == []

    assert rows_by_glob(tmp_path) == rows and rows_by_commits(output) == rows
    assert left(output, photos_named("a", "b", "c", "d")) == photos_named("d")
    console = Console(record=True, width=120)
    assert run_ledger(output, console, rebuild=True) == 0 and "no difference" in console.export_text()
    assert [night["images_per_second"] for night in drift.read_trend(output, NIGHTS)] == [5.0] * 3
    assert [name for name, *_ in drift.read_pairs(output, FIRST, SECOND)] == ["nut"]
    assert [run.cleared for run in read_status(output)] == [False, True, True]
    with pytest.raises(ExportError, match=f"masks; those of night {FIRST} were removed by alfa gc"):
        run_export(output, FIRST, "coco", None, Storage(), console)


def test_with_the_table_old_nights_go_as_a_whole(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    runs = make_lake(output)
    output.write("prompts/nut/x.json", b"{}")
    age(tmp_path)
    before = keys(output)
    expected = list(collect_garbage(output, DAY_S, delete=False, retention=WHOLE))
    assert keys(output) == before
    removed = list(collect_garbage(output, DAY_S, delete=True, retention=WHOLE))
    assert set(removed) == set(expected) and len(set(removed)) == len(removed)
    assert without_leases(keys(output)) == without_leases(key for key in before if THIRD in key or "prompts/" in key)
    assert published_nights(output) == [THIRD] and [run.run_id for run in read_status(output)] == [runs[THIRD]]
    assert rows_by_glob(tmp_path) == rows_by_commits(output) == [(THIRD, "c")]
    # Their photos are as if they had never been scored.
    assert left(output, photos_named("a", "b", "c")) == photos_named("a", "b")
    console = Console(record=True, width=120)
    assert run_ledger(output, console, rebuild=True) == 0 and "no difference" in console.export_text()


def test_a_cleared_night_can_be_published_again(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    make_lake(output)
    age(tmp_path)
    list(collect_garbage(output, DAY_S, delete=True, retention=CUT))
    commit = publish(output, FIRST, dict.fromkeys(photos_named("a", "d"), "ok"), {"nut": METHOD}, run="another")
    assert read_commit(output, FIRST) == commit and commit.cleared_at is None
    assert left(output, photos_named("a", "b", "c", "d", "e")) == photos_named("e")
    age(tmp_path)
    shards = f"runs/{commit.run_id}/shards/one.arrow"
    assert shards in keys(output)
    assert shards in {item.key for item in collect_garbage(output, DAY_S, delete=True, retention=CUT)}


def test_nights_that_are_young_or_at_work_are_left_alone(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    runs = make_lake(output)
    age(tmp_path)
    assert leases.try_acquire(output, paths.night_lease(date.fromisoformat(FIRST)), "publisher", 60)
    assert leases.try_acquire(output, paths.driver_lease(runs[SECOND]), "driver", 60)
    for retention in (CUT, WHOLE):
        for delete in (False, True):
            found = {item.key for item in collect_garbage(output, DAY_S, delete=delete, retention=retention)}
            assert not any(f"runs/{runs[SECOND]}" in key for key in found)
            assert paths.commit_key(FIRST) not in found
    assert f"runs/{runs[FIRST]}/stats.json" in keys(output) and published_nights(output) == list(NIGHTS)

    other = Store(str(tmp_path / "young"))
    make_lake(other)
    assert list(collect_garbage(other, DAY_S, delete=True, retention=WHOLE)) == []
    assert published_nights(other) == list(NIGHTS)


def collect_and_die(folder: Path, retention: Retention, when: str, pattern: str) -> int:
    """Collects in a process of its own that dies around the first key that matches; returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            kill_around(when, pattern, 1)
            list(collect_garbage(Store(str(folder)), DAY_S, delete=True, retention=retention))
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize(
    ("table", "when", "pattern", "known"),
    [
        (False, "after", "^commits/", "abc"),
        (False, "before", "^masks/", "abc"),
        (True, "before", "^commits/", "abc"),
        (True, "after", "^commits/", "bc"),
        (True, "after", "^scores/", "bc"),
        (True, "before", "^runs/.*stats.json", "c"),
        (True, "before", "^ledger/", "c"),
    ],
)
def test_gc_that_is_killed_leaves_a_whole_lake_and_the_next_one_ends_its_work(
    table: bool, when: str, pattern: str, known: str, tmp_path: Path
) -> None:
    output, photos = Store(str(tmp_path)), photos_named("a", "b", "c")
    make_lake(output)
    age(tmp_path)
    retention = WHOLE if table else CUT
    assert os.WTERMSIG(collect_and_die(tmp_path, retention, when, pattern)) == signal.SIGKILL
    assert left(output, photos) == [photo for photo in photos if photo[0] not in known]
    assert "".join(name for _, name in rows_by_commits(output)) == known
    for lease in tmp_path.glob("runs/**/*.claim-*.json"):  # as if the leases of the dead had run out
        lease.write_text(json.dumps({"owner": "dead", "expires_at": 0.0}))
    age(tmp_path)
    list(collect_garbage(output, DAY_S, delete=True, retention=retention))
    whole = Store(str(tmp_path / "undisturbed"))
    make_lake(whole)
    age(tmp_path / "undisturbed")
    list(collect_garbage(whole, DAY_S, delete=True, retention=retention))
    ours = {key for key in keys(output) if not key.startswith("undisturbed/")}
    assert without_leases(ours) == without_leases(keys(whole))


def test_a_night_that_goes_leaves_the_iceberg_table_too(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    for name, night in (("aaa", FIRST), ("bbb", THIRD)):
        run, shards = make_run(output, name, night=night)
        output.write(paths.run_key(run.run_id, "job.yaml"), dump_job_yaml(job_for(output, night)).encode())
        publish_night(run, "m", run.shards, shards, output, "test")
        iceberg.publish_snapshot(job_for(output, night), output, "test")
    age(tmp_path)
    table = iceberg.open_catalog(job_for(output)).load_table("alfa.scores")
    list(collect_garbage(output, DAY_S, delete=True, retention=CUT))
    assert set(table.refresh().scan().to_arrow()["run_date"].to_pylist()) == {date(2026, 1, 1), date(2026, 1, 3)}
    age(tmp_path)
    list(collect_garbage(output, DAY_S, delete=True, retention=WHOLE))
    assert published_nights(output) == [THIRD]
    assert set(table.refresh().scan().to_arrow()["run_date"].to_pylist()) == {date(2026, 1, 3)}
    snapshots = len(table.refresh().snapshots())
    list(collect_garbage(output, DAY_S, delete=True, retention=WHOLE))
    assert len(table.refresh().snapshots()) == snapshots


def test_the_command_says_what_goes_and_removes_only_when_told(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    make_lake(output)
    age(tmp_path)
    before, console = keys(output), Console(record=True, width=120)
    assert run_gc(output, console, 24, delete=False, keep_nights=1) == 0
    shown = console.export_text()
    assert f"masks, maps and shards, but not rows of the nights before {THIRD}" in shown
    assert "nothing was removed" in shown and keys(output) == before
    assert run_gc(output, console, 24, delete=True, keep_days=10_000) == 0
    assert without_leases(keys(output)) == without_leases(before)
    cli = CliRunner()
    done = cli.invoke(app, ["gc", str(tmp_path), "--keep-nights", "1", "--table", "--delete", "--json"])
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["old_before"] == THIRD and document["kinds"]["commits"]["files"] == 2
    assert published_nights(output) == [THIRD]
    for wrong in (["--table"], ["--keep-nights", "1", "--keep-days", "1"], ["--keep-nights", "0"]):
        assert cli.invoke(app, ["gc", str(tmp_path), *wrong]).exit_code == 2
    assert left(output, photos_named("c"), tonight=FOURTH) == []
