"""How far a run is: stats.json and metrics.prom in the lake, a bar on a terminal, lines in a log."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from datetime import datetime, timezone
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.lake import exposition, run_event
from pipeline.scoring import ShardStats
from pipeline.storage import Store, paths, redact

logger = logging.getLogger(__name__)

_STATS_EVERY_S = 15.0


class RunProgress:
    """Counts what finished shards report, and tells the lake and the console. A context manager around the loop."""

    def __init__(
        self, facts: dict[str, Any], output: Store, console: Console, images: int, actors: int, job_started: float
    ) -> None:
        """facts: what stats.json says of the run besides its counts (run_id, images, shards, source, ...).

        images: how many are left to score. job_started: when the whole job began, by time.monotonic.
        """
        self.facts = {**facts, "started_at": _now()}
        self.scored = 0
        self.errors: Counter[str] = Counter()
        self.anomalies: Counter[str] = Counter()
        self._output = output
        self._console = console
        self._job_started = job_started
        self._started = self._written = time.monotonic()
        self._scoring_from: float | None = None
        self._scored_until = self._started
        self._bar = Progress(
            TextColumn("scoring"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.1f} images/s"),
            TextColumn("{task.fields[findings]}"),
            TextColumn(f"{actors} actor{'s' * (actors != 1)}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("scoring", total=images, rate=0.0, findings="")

    def __enter__(self) -> RunProgress:
        self._bar.start()
        self.write("running")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._bar.stop()
        if kind is KeyboardInterrupt:
            self.write("interrupted")
        elif error is not None:
            self.write("failed", error=redact(f"{error}" or type(error).__name__))

    def start_scoring(self) -> None:
        """Starts the clock of the scoring rate: the actors have their models and prompts."""
        self._scoring_from = time.monotonic()

    @property
    def scoring_s(self) -> float:
        """Seconds from start_scoring to the last finished shard."""
        return 0.0 if self._scoring_from is None else max(self._scored_until - self._scoring_from, 0.0)

    @property
    def rate(self) -> float:
        """Images a second while scoring."""
        return self.scored / self.scoring_s if self.scored and self.scoring_s else 0.0

    def add(self, stats: ShardStats) -> None:
        """Counts a finished shard, and now and then tells the lake."""
        self._scored_until = time.monotonic()
        self.scored += stats.images
        self.errors.update(stats.errors)
        self.anomalies.update(stats.anomalies)
        self._bar.update(self._task, advance=stats.images, rate=self.rate, findings=self._findings())
        if time.monotonic() - self._written >= _STATS_EVERY_S:
            self.write("running")
            if not self._console.is_terminal:
                logger.info("%d images scored, %.1f images/s, %s", self.scored, self.rate, self._findings())

    def _findings(self) -> str:
        """Errors and anomalies so far; thresholds that follow from the scores find none before the end."""
        anomalies = f", {self.anomalies.total()} anomalous" if self.anomalies.total() else ""
        return f"{self.errors.total()} errors{anomalies}"

    def write(self, state: str, **more: Any) -> dict[str, Any]:
        """Writes stats.json, and the same facts as metrics.prom. Returns the content of stats.json.

        state: running, done, failed or interrupted. more: the error, or the totals of the published night.
        """
        now = self._written = time.monotonic()
        stats = {
            **self.facts,
            "state": state,
            "updated_at": _now(),
            "scored_by_this_job": self.scored,
            "images_per_second": round(self.scored / max(now - self._started, 1e-9), 2),
            "scoring_images_per_second": round(self.rate, 2),
            "scoring_seconds": round(self.scoring_s, 1),
            "total_seconds": round(now - self._job_started, 1),
            "errors": dict(self.errors),
            "anomalies": dict(self.anomalies),
            **more,
        }
        stats["lineage"] = run_event(stats, stats["source"], self._output.uri(""), stats.get("error"))
        run_id = stats["run_id"]
        self._output.write(paths.run_key(run_id, "metrics.prom"), exposition(stats))
        data = json.dumps(stats, indent=2, ensure_ascii=False).encode()
        self._output.write(paths.run_key(run_id, "stats.json"), data)
        return stats


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
