"""Finding and killing processes by what they are called."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path


def find_processes(pattern: str) -> Iterator[int]:
    """Ids of the running processes whose command line matches a regular expression."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if re.search(pattern, (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")):
                    yield int(folder.name)


def kill_processes(pattern: str) -> int:
    """SIGKILL to all of them; how many there were."""
    killed = 0
    for pid in find_processes(pattern):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed
