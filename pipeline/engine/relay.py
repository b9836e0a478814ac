"""Brings the warnings of actors into the driver's log.

Ray would do it by printing all that workers write to their stdout and stderr, stack traces and colours included, to
the driver's stdout, past its log format. So that is switched off (it stays in Ray's own log files), and warnings travel
with the results of calls.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections import deque
from dataclasses import dataclass
from typing import Any

_MOST_KEPT = 100
"""Warnings between two calls of an actor; of more, the latest."""


@dataclass(frozen=True)
class Warned:
    """A log record of an actor. node: the host name of its machine."""

    level: int
    logger: str
    message: str
    node: str


@dataclass(frozen=True)
class Reply:
    """The result of a call, and what the actor has warned of since its last reply."""

    result: Any
    warnings: tuple[Warned, ...] = ()


class WarningKeeper(logging.Handler):
    """Keeps an actor's warnings until a reply takes them along; prints them too, into Ray's log file of the worker."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._kept: deque[Warned] = deque(maxlen=_MOST_KEPT)
        self._node = socket.gethostname()
        logging.getLogger("pipeline").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps and prints a record."""
        print(self.format(record), file=sys.stderr, flush=True)
        self._kept.append(Warned(record.levelno, record.name, record.getMessage(), self._node))

    def reply(self, result: Any) -> Reply:
        """The result together with the warnings kept, which are forgotten."""
        return Reply(result, tuple(self._kept.popleft() for _ in range(len(self._kept))))


def unpack(reply: Reply) -> Any:
    """The result of a reply; its warnings are logged here, under the names of the loggers that they came from."""
    for warned in reply.warnings:
        logging.getLogger(warned.logger).log(warned.level, "worker on %s: %s", warned.node, warned.message)
    return reply.result
