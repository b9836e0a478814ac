"""Shared by the benches: interleaved runs, and results that are stored with the machine they come from."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def measure(
    runs: Mapping[str, Callable[[], object]], repetitions: int, settle: Callable[[], object] | None = None
) -> dict[str, float]:
    """Median seconds of each run, after one warm-up, the runs taking turns, so that a busy machine slows all alike.

    settle: waits for what a run has only started, as on a GPU.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if settle is not None:
                settle()
            if repetition:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "Linux says in /proc what is resident"
    return int(found[1]) * 1024


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column names a run, the others hold its figures."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def write_results(name: str, facts: Mapping[str, object]) -> None:
    """results/<name>.json: the facts, when they were measured, on what, and how busy it was."""
    RESULTS.mkdir(exist_ok=True)
    surroundings = {
        "at": datetime.now(timezone.utc).isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps({**surroundings, **facts}, indent=2) + "\n")


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
