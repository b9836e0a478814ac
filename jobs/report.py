"""`alfa report`: renders the report of a published night again."""

from __future__ import annotations

import logging

from rich.console import Console

from jobs.console import print_line
from pipeline.lake import published_nights, read_commit
from pipeline.report import ReportError, write_report
from pipeline.storage import Store, paths, redact
from schemas.records import Commit

logger = logging.getLogger(__name__)


def run_report(output: Store, run_id: str | None, run_date: str | None, console: Console) -> int:
    """Writes the report of a published night, and prints its address. Returns the exit code.

    run_id, run_date: either names the night; default: the last one. Raises ReportError where it is not published.
    """
    night = run_date or (run_id[:10] if run_id else _last_night(output))
    commit = read_commit(output, night)
    if commit is None:
        raise ReportError(f"night {night} is not published at {output.uri('')}; alfa status shows the runs there")
    if run_id is not None and commit.run_id != run_id:
        raise ReportError(f"night {night} was published by run {commit.run_id}, not by {run_id}")
    print_line(console, write_report(output, commit))
    return 0


def report_night(output: Store, commit: Commit, *, anew: bool) -> str | None:
    """Writes the report at the end of a night. Returns its address, or None where it could not be written.

    A failure is only logged as a warning, because the night is published already. anew: replace an existing report.
    """
    key = paths.report_key(commit.run_id)
    try:
        return write_report(output, commit) if anew or not output.exists(key) else output.uri(key)
    except Exception as error:
        logger.warning(
            "the night is published, but its report could not be written (%s: %s); try alfa report %s %s",
            type(error).__name__,
            redact(str(error)),
            output.uri(""),
            commit.run_id,
        )
        return None


def _last_night(output: Store) -> str:
    nights = published_nights(output)
    if not nights:
        raise ReportError(f"no night is published at {output.uri('')}")
    return nights[-1]
