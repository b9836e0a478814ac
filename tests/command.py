"""The command line as its users run it: a process of its own."""

from __future__ import annotations

import os
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
