"""Commits: what belongs to a published night; and what its run says of itself."""

from __future__ import annotations

import datetime

from pipeline.storage import Store, paths
from schemas.records import Commit, RunStats, parse_record


def read_commit(output: Store, run_date: datetime.date | str) -> Commit | None:
    """What belongs to a night; None where nothing is published. Raises RecordError where it cannot be understood."""
    key = paths.commit_key(run_date)
    try:
        data = output.read(key)
    except FileNotFoundError:
        return None
    return parse_record(Commit, data, output.uri(key))


def read_stats(output: Store, run_id: str) -> RunStats | None:
    """How a run goes, or went; None where its folder does not say. Raises RecordError."""
    key = paths.run_key(run_id, "stats.json")
    try:
        data = output.read(key)
    except FileNotFoundError:
        return None
    return parse_record(RunStats, data, output.uri(key))


def published_nights(output: Store) -> list[str]:
    """The dates that have a commit, oldest first."""
    keys = [info.key for info in output.list("commits")]
    return sorted(key.removeprefix("commits/").removesuffix(".json") for key in keys if key.endswith(".json"))


def find_night_before(output: Store, run_date: datetime.date | str) -> str | None:
    """The last published night before one that has any rows: nights on which nothing was new have none."""
    for night in reversed(published_nights(output)):
        if night < str(run_date) and (commit := read_commit(output, night)) and commit.rows:
            return night
    return None
