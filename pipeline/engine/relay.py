"""Brings the warnings of actors into the driver's log.

Ray's own way is to print all output of the workers, with stack traces and colours, to the driver's stdout, which
ignores the log format. So that is switched off (the output stays in Ray's log files), and warnings travel with the
results of calls.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from collections import deque
from dataclasses import dataclass
from typing import Any

_MOST_KEPT = 100
"""Warnings that an actor keeps between two replies; if there are more, the latest."""


@dataclass(frozen=True)
class Warned:
    """A log record of an actor. node: the host name of its machine."""

    level: int
    logger: str
    message: str
    node: str


@dataclass(frozen=True)
class Reply:
    """The result of a call, and the warnings of the actor since its last reply."""

    result: Any
    warnings: tuple[Warned, ...] = ()


class WarningKeeper(logging.Handler):
    """Keeps an actor's warnings for its next reply, and prints them to Ray's log file of the worker."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._kept: deque[Warned] = deque(maxlen=_MOST_KEPT)
        self._node = socket.gethostname()
        logging.getLogger("pipeline").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps and prints a record."""
        with contextlib.suppress(OSError):  # the node's disk may be full
            print(self.format(record), file=sys.stderr, flush=True)
        self._kept.append(Warned(record.levelno, record.name, record.getMessage(), self._node))

    def reply(self, result: Any) -> Reply:
        """Returns the result together with the warnings kept so far, and forgets them."""
        return Reply(result, tuple(self._kept.popleft() for _ in range(len(self._kept))))


def unpack(reply: Reply) -> Any:
    """Returns the result of a reply, and logs its warnings here, under their original loggers."""
    for warned in reply.warnings:
        logging.getLogger(warned.logger).log(warned.level, "worker on %s: %s", warned.node, warned.message)
    return reply.result
