"""`alfa report`: renders the report of a published night anew."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from pipeline.lake import read_commit
from pipeline.report import ReportError, published_nights, write_report
from pipeline.storage import Store, paths, redact

logger = logging.getLogger(__name__)


def run_report(output: Store, run_id: str | None, run_date: str | None, console: Console) -> int:
    """Writes the report of a run, of a night, or of the last night, and prints where it lies. Returns the exit code.

    Raises ReportError where no such night is published.
    """
    night = run_date or (run_id[:10] if run_id else _last_night(output))
    commit = read_commit(output, night)
    if commit is None:
        raise ReportError(f"night {night} is not published at {output.uri('')}; alfa status shows its runs")
    if run_id is not None and commit["run_id"] != run_id:
        raise ReportError(f"night {night} is published by run {commit['run_id']}, not by {run_id}")
    console.print(escape(write_report(output, commit)), highlight=False, soft_wrap=True)
    return 0


def report_night(output: Store, commit: Mapping[str, Any], *, anew: bool) -> str | None:
    """The report at the end of a night: written if `anew` or missing; returns where it lies, None where it failed.

    The results are published by then, so whatever is wrong with their picture is a warning.
    """
    key = paths.report_key(commit["run_id"])
    try:
        return write_report(output, commit) if anew or not output.exists(key) else output.uri(key)
    except Exception as error:
        logger.warning(
            "the night is published, but its report could not be written (%s: %s); try alfa report %s %s",
            type(error).__name__,
            redact(str(error)),
            output.uri(""),
            commit["run_id"],
        )
        return None


def _last_night(output: Store) -> str:
    nights = published_nights(output)
    if not nights:
        raise ReportError(f"no night is published at {output.uri('')}")
    return nights[-1]
