"""Runs the command line as users do: in this process, or in a new one."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from typer.testing import CliRunner

from jobs.cli import app

COMMAND = [sys.executable, "-c", "from jobs.cli import main; main()"]

Ended = subprocess.CompletedProcess[str]


def alfa(*arguments: str | Path, **environment: str) -> Ended:
    """Runs `alfa` in this process, which spares it the import of torch; a fault in alfa itself is raised."""
    command = [str(argument) for argument in arguments]
    with _own_logging():
        runner = CliRunner(env={"COLUMNS": "200", **environment})
        shown = runner.invoke(app, command, catch_exceptions=False, prog_name="alfa")
    return subprocess.CompletedProcess(command, shown.exit_code, shown.stdout, shown.stderr)


def alfa_alone(*arguments: str | Path, limit_s: float = 280, **environment: str) -> Ended:
    """Runs `alfa` in a process of its own, with a Ray of its own, and all that libraries print captured."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200", **environment}, timeout=limit_s
    )


@contextlib.contextmanager
def _own_logging() -> Iterator[None]:
    """The command line sets up the logging of its process, which here is that of all tests."""
    loggers = [logging.getLogger(name) for name in (None, "jobs", "pipeline")]
    handlers, levels = logging.root.handlers[:], [logger.level for logger in loggers]
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def lines_of_others(log: str) -> list[str]:
    """The lines of a text log that are neither a record of alfa's nor one of its closing lines."""
    own = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING|ERROR) |alfa: ")
    return [line for line in log.splitlines() if not own.match(line)]
