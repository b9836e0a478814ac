"""Reads commits, which say what belongs to a published night, and the stats of runs."""

from __future__ import annotations

import datetime

from pipeline.storage import Store, paths
from schemas.records import Commit, RunStats, parse_record


def read_commit(output: Store, run_date: datetime.date | str) -> Commit | None:
    """Reads the commit of a night; None if the night is not published. Raises RecordError if it cannot be read."""
    key = paths.commit_key(run_date)
    try:
        data = output.read(key)
    except FileNotFoundError:
        return None
    return parse_record(Commit, data, output.uri(key))


def read_stats(output: Store, run_id: str) -> RunStats | None:
    """Reads the stats of a run; None if it has none. Raises RecordError if they cannot be read."""
    key = paths.run_key(run_id, "stats.json")
    try:
        data = output.read(key)
    except FileNotFoundError:
        return None
    return parse_record(RunStats, data, output.uri(key))


def published_nights(output: Store) -> list[str]:
    """Lists the dates of the published nights, the oldest first."""
    keys = [info.key for info in output.list("commits")]
    return sorted(key.removeprefix("commits/").removesuffix(".json") for key in keys if key.endswith(".json"))


def find_night_before(output: Store, run_date: datetime.date | str) -> str | None:
    """Finds the last published night before a date that has rows; a night without new photos has none."""
    for night in reversed(published_nights(output)):
        if night < str(run_date) and (commit := read_commit(output, night)) and commit.rows:
            return night
    return None
