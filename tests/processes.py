"""Finds and kills processes by name."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path


def find_processes(pattern: str, below: int | None = None) -> Iterator[int]:
    """Ids of the running processes whose command line matches a regular expression.

    below: only those that this process has started, itself or by others that it has started.
    """
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if re.search(pattern, command) and (below is None or below in _ancestors(int(folder.name))):
                    yield int(folder.name)


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        # The second field, a name in parentheses, may hold anything.
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid


def kill_processes(pattern: str, below: int | None = None) -> int:
    """SIGKILL to all that find_processes finds; how many there were."""
    killed = 0
    for pid in find_processes(pattern, below):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed
