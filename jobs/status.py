"""`alfa status`: shows the runs of an output with their progress and errors, from any storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

from rich.console import Console
from rich.markup import escape

from jobs.console import make_table, print_json, print_line
from pipeline.lake import published_nights, read_commit, read_stats
from pipeline.storage import Store, paths
from schemas.records import RunStats

_SILENT_AFTER_S = 300
"""A driver writes its stats four times a minute. One that has written none for so long is taken for dead."""


@dataclass(frozen=True)
class RunStatus:
    """The state of a run, from its stats.json and its finished shards.

    state: running, done, failed or interrupted, as its driver last wrote. silent_s: seconds since a running driver
    last wrote, if it is taken for dead; else None. cleared: whether alfa gc has removed its masks and shards.
    images_per_second: average while scoring.
    """

    run_id: str
    state: str
    silent_s: int | None
    published: bool
    cleared: bool
    shards: int
    finished_shards: int
    images: int
    errors: Mapping[str, int]
    anomalies: Mapping[str, int]
    images_per_second: float
    updated_at: str


def print_status(output: Store, console: Console, *, as_json: bool = False) -> int:
    """Prints the runs of an output, the newest night first. Returns the exit code."""
    runs = read_status(output)
    if as_json:
        print_json({"output": output.uri(""), "runs": [asdict(run) for run in runs]})
        return 0
    if not runs:
        print_line(console, f"no runs at {output.uri('')}")
        return 0
    columns = ("run", "state", "shards", "images", "errors", "anomalous", "images/s", "updated, UTC")
    table = make_table(columns, left=("run", "state"), whole=("run",))
    for run in runs:
        table.add_row(
            escape(run.run_id),
            _describe_state(run),
            f"{run.finished_shards}/{run.shards}",
            str(run.images),
            ", ".join(f"{count} {kind}" for kind, count in sorted(run.errors.items())) or "0",
            str(sum(run.anomalies.values())),
            f"{run.images_per_second:g}",
            f"{datetime.fromisoformat(run.updated_at):%Y-%m-%d %H:%M}",
        )
    console.print(table)
    return 0


def read_status(output: Store) -> list[RunStatus]:
    """Reads the runs of an output, the newest night first."""
    commits = (read_commit(output, night) for night in published_nights(output))
    published = {commit.run_id: commit.cleared_at is not None for commit in commits if commit is not None}
    keys = [info.key for info in output.list("runs") if info.key.endswith("/stats.json")]
    found = (read_stats(output, key.split("/")[1]) for key in sorted(keys, reverse=True))
    return [_read_run(output, stats, published) for stats in found if stats is not None]


def _read_run(output: Store, stats: RunStats, published: Mapping[str, bool]) -> RunStatus:
    """Reads the status of a run. published: for each published run, whether alfa gc has removed its shards."""
    age = datetime.now(timezone.utc) - stats.updated_at
    is_silent = stats.state == "running" and age.total_seconds() > _SILENT_AFTER_S
    return RunStatus(
        run_id=stats.run_id,
        state=stats.state,
        silent_s=int(age.total_seconds()) if is_silent else None,
        published=stats.run_id in published,
        cleared=published.get(stats.run_id, False),
        shards=stats.shards,
        finished_shards=len(paths.finished_shards(output, paths.run_key(stats.run_id, "shards"))),
        images=stats.images,
        errors=stats.errors,
        anomalies=stats.anomalies,
        images_per_second=stats.rate,
        updated_at=stats.updated_at.isoformat(),
    )


def _describe_state(run: RunStatus) -> str:
    if run.silent_s is not None:
        state = f"no sign of life for {run.silent_s // 60} min; run the same command again to resume"
    else:
        state = run.state
    return state + (", published" if run.published else "") + (", cleared" if run.cleared else "")
