"""Shows the progress of a run: stats.json and metrics.prom in the lake, a bar on a terminal, lines in a log."""

from __future__ import annotations

import logging
import time
from collections import Counter
from datetime import datetime, timezone

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.lake import exposition, run_event
from pipeline.scoring import ShardStats
from pipeline.storage import Store, paths, redact
from schemas.records import ActorCounts, Commit, RunState, RunStats, dump_record

logger = logging.getLogger(__name__)

_STATS_EVERY_S = 15.0


class RunProgress:
    """Counts finished shards, and shows the counts in the lake and on the console. A context manager."""

    def __init__(self, facts: RunStats, output: Store, console: Console, images: int, job_started: float) -> None:
        """facts: the parts of stats.json that are not counted here.

        images: number of images left to score. job_started: time.monotonic() at the start of the whole job.
        """
        self.facts = facts.model_copy(update={"started_at": _now()})
        self.scored = 0
        self.errors: Counter[str] = Counter()
        self.anomalies: Counter[str] = Counter()
        self.clipped = 0
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
            TextColumn("{task.fields[actors]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("scoring", total=images, rate=0.0, findings="", actors="")

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
        """Starts the clock of the scoring rate. Call it when the actors have loaded the model and the prompts."""
        self._scoring_from = time.monotonic()

    def count_actors(self, actors: ActorCounts) -> None:
        """Records the number of actors, and what each holds of the cluster."""
        self.facts = self.facts.model_copy(update={"actors": actors})
        self._bar.update(self._task, actors=f"{actors.count} actor{'s' * (actors.count != 1)}")

    @property
    def scoring_s(self) -> float:
        """Seconds from start_scoring to the last finished shard."""
        return 0.0 if self._scoring_from is None else max(self._scored_until - self._scoring_from, 0.0)

    @property
    def rate(self) -> float:
        """Images per second while scoring."""
        return self.scored / self.scoring_s if self.scored and self.scoring_s else 0.0

    def add(self, stats: ShardStats) -> None:
        """Counts a finished shard, and writes the stats if the last time was long enough ago."""
        self._scored_until = time.monotonic()
        self.scored += stats.images
        self.errors.update(stats.errors)
        self.anomalies.update(stats.anomalies)
        self.clipped += stats.clipped
        self._bar.update(self._task, advance=stats.images, rate=self.rate, findings=self._findings())
        if time.monotonic() - self._written >= _STATS_EVERY_S:
            self.write("running")
            if not self._console.is_terminal:
                logger.info("%d images scored, %.1f images/s, %s", self.scored, self.rate, self._findings())

    def _findings(self) -> str:
        """Describes errors and anomalies so far. With thresholds that follow from the scores, none are known yet."""
        anomalies = f", {self.anomalies.total()} anomalous" if self.anomalies.total() else ""
        return f"{self.errors.total()} errors{anomalies}"

    def write(self, state: RunState, error: str | None = None, commit: Commit | None = None) -> RunStats:
        """Writes stats.json, and the same facts as metrics.prom. Returns the content of stats.json.

        commit: the published night; its totals include what other jobs of the run have scored.
        """
        now = self._written = time.monotonic()
        counted = {
            "state": state,
            "error": error,
            "updated_at": _now(),
            "scored_by_this_job": self.scored,
            "images_per_second": round(self.scored / max(now - self._started, 1e-9), 2),
            "scoring_images_per_second": round(self.rate, 2),
            "scoring_seconds": round(self.scoring_s, 1),
            "total_seconds": round(now - self._job_started, 1),
            "rows": None if commit is None else commit.rows,
            "errors": dict(self.errors) if commit is None else commit.errors,
            "anomalies": dict(self.anomalies) if commit is None else commit.anomalies,
            "clipped": self.clipped,
        }
        stats = self.facts.model_copy(update=counted)
        stats = stats.model_copy(update={"lineage": run_event(stats, self._output.uri(""))})
        self._output.write(paths.run_key(stats.run_id, "metrics.prom"), exposition(stats))
        self._output.write(paths.run_key(stats.run_id, "stats.json"), dump_record(stats))
        return stats


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)
