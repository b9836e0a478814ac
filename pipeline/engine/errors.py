"""The error of the engine, and how errors of remote calls become ours again."""

from __future__ import annotations

import ray.exceptions


class EngineError(RuntimeError):
    """The cluster cannot do the job; the message says what to do."""


def cause_of(error: ray.exceptions.RayTaskError) -> Exception:
    """The exception that a remote call raised, without Ray's wrapping and its remote traceback."""
    return error.cause if isinstance(error.cause, Exception) else EngineError(str(error))
