"""`alfa backfill`: scores the nights of a range of dates, one after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console

from jobs import exits
from jobs.console import make_table
from pipeline.lake import read_commit
from pipeline.storage import open_store
from schemas.job import JobConfig
from schemas.records import Commit

logger = logging.getLogger(__name__)

_OUTCOMES = {0: "published", exits.USAGE: "refused", exits.INTERRUPTED: "interrupted"}


@dataclass(frozen=True)
class Outcome:
    """The outcome of a night. code: its exit code; None where it was not begun. seconds: how long it took."""

    job: JobConfig
    code: int | None
    said: str
    seconds: float = 0.0


def run_backfill(
    jobs: Sequence[JobConfig],
    score: Callable[[JobConfig], int],
    console: Console,
    *,
    again: bool = False,
    stop_on_error: bool = False,
) -> int:
    """Scores each night that is not published, in order, and prints a table of all nights. Returns the exit code.

    The code is 0 if all nights are published, 130 if the command was interrupted, 2 if every night that was tried was
    refused, and 1 otherwise. Run again, the command goes on with the missing nights.

    Args:
        jobs: one job per night.
        score: scores a night and returns its exit code, see exits.attempt.
        again: also run published nights; one whose inputs are unchanged finds nothing to do.
        stop_on_error: do not begin further nights after one that fails.
    """
    outcomes: list[Outcome] = []
    stopped = False
    for number, job in enumerate(jobs, 1):
        if stopped:
            outcomes.append(Outcome(job, None, "not begun"))
            continue
        if not again and _find_commit(job) is not None:
            outcomes.append(Outcome(job, 0, "was published"))
            continue
        logger.info("night %s, %d of %d", job.run_date, number, len(jobs))
        started = time.monotonic()
        code = _try(score, job)
        said = _OUTCOMES.get(code, "failed")
        outcomes.append(Outcome(job, code, said, time.monotonic() - started))
        stopped = code == exits.INTERRUPTED or (code != 0 and stop_on_error)
    _print(outcomes, console)
    return _exit_code([outcome.code for outcome in outcomes if outcome.said != "was published"])


def _try(score: Callable[[JobConfig], int], job: JobConfig) -> int:
    try:
        return score(job)
    except Exception:  # a fault in alfa itself costs its night, not the others
        logger.critical("a fault in alfa itself in night %s; please report it", job.run_date, exc_info=True)
        return exits.ERRORS


def _find_commit(job: JobConfig) -> Commit | None:
    return read_commit(open_store(job.output.uri, job.storage), job.run_date)


def _print(outcomes: Sequence[Outcome], console: Console) -> None:
    columns = ("night", "outcome", "images", "anomalous", "errors", "time")
    table = make_table(columns, left=("night", "outcome"), title=f"{len(outcomes)} nights")
    for outcome in outcomes:
        commit = _find_commit(outcome.job)
        cells = ["-"] * 3
        if commit is not None:
            cells = [str(commit.rows), str(sum(commit.anomalies.values())), str(commit.failed)]
        table.add_row(str(outcome.job.run_date), _describe(outcome), *cells, f"{outcome.seconds:.0f} s")
    console.print(table)


def _describe(outcome: Outcome) -> str:
    return outcome.said if not outcome.code else f"{outcome.said}, exit code {outcome.code}"


def _exit_code(codes: Sequence[int | None]) -> int:
    """Returns the exit code of the command. codes: those of the nights; None for nights that were not begun."""
    tried = [code for code in codes if code is not None]
    if exits.INTERRUPTED in tried:
        return exits.INTERRUPTED
    if tried and all(code == exits.USAGE for code in tried):
        return exits.USAGE
    return exits.ERRORS if any(tried) else 0
