"""Commits: what belongs to a published night."""

from __future__ import annotations

import json
from typing import Any

from pipeline.storage import Store, paths


def read_commit(output: Store, run_date: Any) -> dict[str, Any] | None:
    """What belongs to a night; None where nothing is published."""
    try:
        commit: dict[str, Any] = json.loads(output.read(paths.commit_key(run_date)))
    except FileNotFoundError:
        return None
    return commit


def published_nights(output: Store) -> list[str]:
    """The dates that have a commit, oldest first."""
    keys = [info.key for info in output.list("commits")]
    return sorted(key.removeprefix("commits/").removesuffix(".json") for key in keys if key.endswith(".json"))


def find_night_before(output: Store, run_date: Any) -> str | None:
    """The last published night before one that has any rows: nights on which nothing was new have none."""
    for night in reversed(published_nights(output)):
        if night < str(run_date) and (commit := read_commit(output, night)) and commit["rows"]:
            return night
    return None
