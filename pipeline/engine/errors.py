"""The error of the engine, and what is said of errors from remote calls."""

from __future__ import annotations

from itertools import takewhile

import ray.exceptions

from schemas.text import one_line


class EngineError(RuntimeError):
    """The cluster cannot run the job; the message says what to do."""


def cause_of(error: ray.exceptions.RayTaskError) -> Exception:
    """Returns the exception that a remote call has raised, without Ray's wrapper and the remote traceback."""
    return error.cause if isinstance(error.cause, Exception) else EngineError(str(error))


def reason_of(error: ray.exceptions.RayError) -> str:
    """Returns one line about why an actor has died, of at most 400 characters."""
    text = str(error)
    return one_line(last_raised(text) if "Traceback (most recent call last)" in text else text)[:400]


def last_raised(text: str) -> str:
    """Returns the error at the end of a text with a traceback: the last lines that are not indented."""
    raised = takewhile(lambda line: not line.startswith(" "), reversed(text.rstrip().splitlines()))
    return "\n".join(reversed(list(raised)))
