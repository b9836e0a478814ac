"""Commits: what belongs to a published night."""

from __future__ import annotations

import datetime

from pipeline.storage import Store, paths
from schemas.records import Commit, parse_record


def read_commit(output: Store, run_date: datetime.date | str) -> Commit | None:
    """What belongs to a night; None where nothing is published. Raises RecordError where it cannot be understood."""
    key = paths.commit_key(run_date)
    try:
        data = output.read(key)
    except FileNotFoundError:
        return None
    return parse_record(Commit, data, output.uri(key))


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
