"""The error of the engine, and the unwrapping of errors from remote calls."""

from __future__ import annotations

import ray.exceptions


class EngineError(RuntimeError):
    """The cluster cannot run the job; the message says what to do."""


def cause_of(error: ray.exceptions.RayTaskError) -> Exception:
    """Returns the exception that a remote call has raised, without Ray's wrapper and the remote traceback."""
    return error.cause if isinstance(error.cause, Exception) else EngineError(str(error))
