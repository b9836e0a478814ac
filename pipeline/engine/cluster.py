"""Connects a job to its Ray cluster, and lists the nodes of the cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import ray

from pipeline.engine import internals
from pipeline.engine.errors import EngineError, last_raised
from pipeline.engine.plan import Node
from schemas.job import JobConfig
from schemas.text import one_line

_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
"""Ray logs only its own warnings in the driver. Warnings of actors come with their replies (relay.py)."""


@contextlib.contextmanager
def connect(job: JobConfig, timeout_s: float = 60.0) -> Iterator[None]:
    """Joins the cluster that engine.address or RAY_ADDRESS names, or starts a Ray of its own if neither is set.

    A Ray that already runs on this machine is never joined by chance. Inside another connect(), the connection is
    shared. Raises EngineError if the cluster does not answer within timeout_s seconds, or no local Ray can be started.
    """
    if ray.is_initialized():
        yield
        return
    # Ray would report its usage over the internet, but factories are often not connected to it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without it, older versions of Ray print a warning at the start of each actor without a GPU.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = job.engine.address or os.environ.get("RAY_ADDRESS", "")
    with internals.without_prints():
        with internals.own_sigterm():
            if is_local(job):
                _start_local()
            else:
                _join(address, timeout_s)
        try:
            yield
        finally:
            ray.shutdown()


def _start_local() -> None:
    try:
        with internals.loopback_only(), internals.without_token_hint():
            # Without an address, Ray would join the cluster that was last started on this machine, even a dead one.
            ray.init(address="local", include_dashboard=False, **_QUIET)
    except Exception as error:
        raise EngineError(f"no local Ray can be started: {one_line(str(error))}") from error


def _join(address: str, timeout_s: float) -> None:
    if "://" not in address:  # Ray's client has its own time-out of 30 s
        _ask_head(address, timeout_s)
    try:
        ray.init(address=address, **_QUIET)
    except Exception as error:
        raise _refusal(address, str(error)) from error


def _ask_head(address: str, timeout_s: float) -> None:
    """Raises EngineError if the head of a cluster does not answer in time.

    Another process asks it, because `ray.init` would try for more than ten minutes and ignore signals.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise _refusal(address, f"no answer for {timeout_s:g} s") from None
    if done.returncode:
        raise _refusal(address, last_raised(done.stderr))


def _refusal(address: str, reason: str) -> EngineError:
    said = one_line(reason).rstrip(".")
    return EngineError(
        f"the Ray cluster at {address} cannot be joined: {said}; check that its head runs, and that engine.address or "
        f"RAY_ADDRESS is right"
    )


def is_local(job: JobConfig) -> bool:
    """Whether the job starts a Ray of its own, because neither engine.address nor RAY_ADDRESS names a cluster."""
    return (job.engine.address or os.environ.get("RAY_ADDRESS") or "local") == "local"


def list_nodes() -> list[Node]:
    """Lists the nodes of the connected cluster that are alive."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [Node(node["NodeID"], node["Resources"], node.get("Labels", {})) for node in nodes if node["Alive"]]


def can_grow(job: JobConfig) -> bool:
    """Whether an autoscaler may add nodes to the connected cluster."""
    return not is_local(job) and internals.has_autoscaler()
