"""What goes wrong on a cluster, as one clear error."""

from __future__ import annotations

import ray.exceptions


class EngineError(RuntimeError):
    """The cluster cannot do the job; the message says what to do."""


def cause_of(error: ray.exceptions.RayTaskError) -> Exception:
    """Our own exception of a remote call."""
    return error.cause if isinstance(error.cause, Exception) else EngineError(str(error))
