"""The command line as its users run it: a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, "-c", "from jobs.cli import main; main()"]


def alfa(*arguments: str | Path, limit_s: float = 280, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `alfa` with its output captured."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200", **environment}, timeout=limit_s
    )


def lines_of_others(log: str) -> list[str]:
    """The lines of a text log that are neither a record of alfa's nor one of its closing lines."""
    own = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING|ERROR) |alfa: ")
    return [line for line in log.splitlines() if not own.match(line)]
