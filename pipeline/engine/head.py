"""Watches whether the head of the cluster answers, so that a night without a head ends with a clear line."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
import ray.exceptions

from pipeline.engine import internals
from pipeline.engine.errors import EngineError

logger = logging.getLogger(__name__)

REFRESH_EVERY_S = 5.0
"""Seconds between two looks at the cluster."""

_ANSWER_WITHIN_S = 2.0

_EARLIER_S = 20.0
"""Seconds by which a job gives up a silent head before Ray would end the process: time for two looks and the end."""


class HeadWatch:
    """Asks the head of the connected cluster for a sign of life. silent: whether it gave none the last time."""

    def __init__(self) -> None:
        self.silent = False
        self._heard = time.monotonic()
        self._patience_s = max(0.0, internals.head_patience_s() - _EARLIER_S)

    def ask(self) -> None:
        """Asks now; it takes up to two seconds if the head is silent.

        Raises EngineError if the head has been silent for too long, or was started again without its memory.
        """
        was_silent = self.silent
        self.silent = not internals.head_answers(_ANSWER_WITHIN_S)
        silent_s = time.monotonic() - self._heard
        if not self.silent:
            self._heard = time.monotonic()
            if was_silent:
                logger.warning("the head of the Ray cluster answers again")
        elif silent_s >= self._patience_s:
            raise EngineError(f"the head of the Ray cluster has not answered for {silent_s:.0f} s; check that it runs")
        elif not was_silent:
            left = self._patience_s - silent_s
            logger.warning(
                "the head of the Ray cluster does not answer; actors go on, and the job ends if it stays silent for "
                "%.0f s more",
                left,
            )

    def get(self, references: Sequence[Any]) -> list[Any]:
        """Returns the results of remote calls, as `ray.get` does, and asks the head every five seconds until then."""
        while True:
            try:
                return list(ray.get(list(references), timeout=REFRESH_EVERY_S))
            except ray.exceptions.GetTimeoutError:
                self.ask()
