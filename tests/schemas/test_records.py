"""Tests that documents of the lake, also of older versions, are read back as written, and invalid ones are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from schemas.records import Commit, RecordError, RunStats, dump_record, parse_record

FILE = {
    "class_name": "nut",
    "scored_as": "a" * 32,
    "span": [0.0, 4095.0],
    "rows": 5,
    "errors": {"corrupt": 1, "empty": 1},
    "anomalies": 2,
    "key": "runs/2026-01-02-abc/table-m/part.parquet",
    "table_key": "scores/run_date=2026-01-02/class_name=nut/part-00000.parquet",
    "bytes": 10,
    "sha256": "0" * 64,
    "compared": 3,
    "beyond": 1,
}
COMMIT: dict[str, Any] = {
    "schema_version": 2,
    "run_date": "2026-01-02",
    "run_id": "2026-01-02-abc",
    "manifest": "m",
    "shards": "runs/2026-01-02-abc/shards",
    "select": "new",
    "rows": 8,
    "committed_at": "2026-01-02T03:00:00Z",
    "cleared_at": None,
    "files": [FILE, {**FILE, "class_name": "bolt", "rows": 3, "errors": {"empty": 1}, "anomalies": 0}],
}


def parse(document: object) -> Commit:
    return parse_record(Commit, json.dumps(document).encode(), "lake/commits/x.json")


def test_a_commit_reads_back_as_it_was_written_and_counts_its_classes() -> None:
    commit = parse(COMMIT)
    assert json.loads(dump_record(commit)) == COMMIT
    assert (commit.errors, commit.failed, commit.anomalies) == ({"corrupt": 1, "empty": 2}, 3, {"nut": 2, "bolt": 0})


@pytest.mark.parametrize(("compared", "beyond", "expected"), [(0, 0, False), (9, 3, False), (9, 4, True)])
def test_a_class_is_beyond_its_fence_where_more_than_a_third_is(compared: int, beyond: int, expected: bool) -> None:
    commit = parse({**COMMIT, "files": [{**FILE, "compared": compared, "beyond": beyond}]})
    assert commit.files[0].is_beyond_fence is expected


def test_commits_of_earlier_and_of_later_versions_are_read_as_far_as_they_can_be() -> None:
    early = {key: value for key, value in COMMIT.items() if key not in ("shards", "select", "cleared_at")}
    commit = parse({**early, "schema_version": 1})
    assert (commit.shards, commit.select, commit.cleared_at) == (None, "all", None)
    assert parse({**COMMIT, "added_later": 1}) == parse(COMMIT)
    with pytest.raises(RecordError, match=r"lake/commits/x\.json cannot be read: it was written by a newer version"):
        parse({**COMMIT, "schema_version": 99, "rows": "?"})


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ({**COMMIT, "rows": -1}, r"rows: Input should be greater than or equal to 0"),
        ({**COMMIT, "files": [{**FILE, "sha256": None}]}, r"files\.0\.sha256: Input should be a valid string"),
        ({key: value for key, value in COMMIT.items() if key != "run_id"}, r"run_id: Field required"),
        ([], r"document: Input should be an object"),
    ],
)
def test_a_commit_that_is_not_whole_is_refused_by_name(document: object, fault: str) -> None:
    with pytest.raises(RecordError, match=rf"lake/commits/x\.json cannot be read: {fault}"):
        parse(document)


def test_stats_of_early_versions_are_read_and_rates_are_those_of_scoring() -> None:
    early = {
        "run_id": "2026-01-02-abc",
        "state": "done",
        "updated_at": "2026-01-02T03:00:00+00:00",
        "images": 10,
        "shards": 2,
        "errors": {},
        "anomalies": {"nut": 1},
        "images_per_second": 2.5,
        "demonstration_model": True,
    }
    stats = parse_record(RunStats, json.dumps(early).encode(), "stats.json")
    assert (stats.rate, stats.demonstration_model, stats.usage.calls, stats.selection) == (2.5, True, 0, None)
    later = parse_record(RunStats, json.dumps({**early, "scoring_images_per_second": 0.0}).encode(), "stats.json")
    assert later.rate == 0.0
    assert parse_record(RunStats, dump_record(later), "stats.json").anomalies == {"nut": 1}
    with pytest.raises(RecordError, match=r"stats\.json cannot be read: state: Input should be 'running', 'done'"):
        parse_record(RunStats, json.dumps({**early, "state": "tired"}).encode(), "stats.json")


def test_a_command_that_meets_one_says_so_in_a_line(tmp_path: Any) -> None:
    (tmp_path / "commits").mkdir()
    (tmp_path / "commits" / "2026-01-02.json").write_text('{"half')
    done = CliRunner().invoke(app, ["ledger", str(tmp_path)])
    assert done.exit_code == 2
    assert f"alfa: {tmp_path}/commits/2026-01-02.json cannot be read: document: Invalid JSON" in done.stderr
