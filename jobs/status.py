"""`alfa status`: the runs of an output, their progress and errors, read from any storage."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.storage import Store, paths

_SILENT_AFTER_S = 300


def print_status(output: Store, console: Console) -> int:
    """A row a run, the newest night first. Returns the exit code."""
    keys = [info.key for info in output.list("runs") if info.key.endswith("/stats.json")]
    if not keys:
        console.print(f"no runs at {escape(output.uri(''))}")
        return 0
    published = {
        commit["run_id"]
        for info in output.list("commits")
        if info.key.endswith(".json") and (commit := json.loads(output.read(info.key)))
    }
    table = Table()
    for column in ("run", "state", "shards", "images", "errors", "anomalous", "images/s", "updated"):
        table.add_column(column, justify="left" if column in ("run", "state") else "right", no_wrap=column == "run")
    for key in sorted(keys, reverse=True):
        stats = json.loads(output.read(key))
        finished = len(paths.finished_shards(output, paths.run_key(stats["run_id"], "shards")))
        state = _state(stats) + (", published" if stats["run_id"] in published else "")
        table.add_row(
            escape(stats["run_id"]),
            state,
            f"{finished}/{stats['shards']}",
            str(stats["images"]),
            _errors(stats["errors"]),
            str(sum(stats["anomalies"].values())),
            str(stats["images_per_second"]),
            stats["updated_at"],
        )
    console.print(table)
    return 0


def _state(stats: dict[str, Any]) -> str:
    silent = (datetime.now(timezone.utc) - datetime.fromisoformat(stats["updated_at"])).total_seconds()
    if stats["state"] == "running" and silent > _SILENT_AFTER_S:
        return f"no sign of life for {silent / 60:.0f} min; run the same command again to resume"
    return str(stats["state"])


def _errors(errors: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(errors.items())) or "0"
