"""Runs `alfa` in this process and kills with SIGKILL when it has come to a given point.

    python -m tests.killed_driver POINT alfa-arguments...

POINT is `before:PATTERN:N` or `after:PATTERN:N`: around the N-th object that the driver writes, creates, replaces or
deletes with a key that matches the regular expression; `shard:N`: when the driver has heard of N finished shards. These
kill the driver; `workers:N` kills all its scoring workers at N finished shards instead.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from jobs import cli
from pipeline.storage import Store
from tests.processes import kill_processes


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_around(when: str, pattern: str, number: int) -> None:
    """Kills this process before or after the N-th object whose key matches is written, created, replaced or deleted."""
    seen, thread = 0, threading.local()

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Store, key: str, *arguments: Any) -> Any:
            nonlocal seen
            inside = getattr(thread, "inside", False)  # a replacement may be a creation
            matches = not inside and re.search(pattern, key) is not None
            seen += matches
            if matches and seen == number and when == "before":
                _die()
            thread.inside = True
            try:
                result = method(self, key, *arguments)
            finally:
                thread.inside = inside
            if matches and seen == number:
                _die()
            return result

        return call

    for name in ("write", "create", "replace", "delete"):
        setattr(Store, name, wrap(getattr(Store, name)))


def _act_at_shard(number: int, action: Callable[[], Any]) -> None:
    from jobs import progress  # with torch, which kill_around has no need of

    heard = 0
    add = progress.RunProgress.add

    def count(self: progress.RunProgress, stats: Any) -> None:
        nonlocal heard
        add(self, stats)
        heard += 1
        if heard == number:
            action()

    progress.RunProgress.add = count  # type: ignore[method-assign]


if __name__ == "__main__":
    point, sys.argv[1:] = sys.argv[1], sys.argv[2:]
    kind, _, rest = point.partition(":")
    if kind == "shard":
        _act_at_shard(int(rest), _die)
    elif kind == "workers":
        _act_at_shard(int(rest), lambda: kill_processes("ray::ScoringActor", os.getpid()))
    else:
        wanted, _, count = rest.rpartition(":")
        kill_around(kind, wanted, int(count))
    cli.main()
