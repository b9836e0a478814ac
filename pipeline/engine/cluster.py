"""Connects a job to its Ray cluster, and plans how many actors of what size it starts there."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import ray

from pipeline.engine import internals
from pipeline.engine.errors import EngineError
from schemas.job import JobConfig
from schemas.text import one_line

logger = logging.getLogger(__name__)

_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
"""What Ray tells the driver: its own warnings. Those of actors come with their replies (relay.py)."""


@dataclass(frozen=True)
class ActorPlan:
    """How many scoring actors to start, and the CPU cores and GPUs of each; a shared GPU is a fraction."""

    count: int
    cpus: int
    gpus: float


@contextlib.contextmanager
def connect(job: JobConfig, timeout_s: float = 60.0) -> Iterator[None]:
    """Joins the cluster that engine.address or RAY_ADDRESS names; where neither does, starts a Ray for its own use.

    A Ray that happens to run on this machine is left alone. Inside another connect(), the connection is shared.
    Raises EngineError where the cluster does not answer within timeout_s, or where no local Ray can be started.
    """
    if ray.is_initialized():
        yield
        return
    # Ray would report its usage over the internet, which factories are not connected to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Older versions of Ray warn, at the start of each actor without a GPU, that this setting will change.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = job.engine.address or os.environ.get("RAY_ADDRESS") or "local"
    with internals.without_prints():
        with internals.own_sigterm():
            if address == "local":
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
            # Without an address, Ray joins whatever cluster was started last on this machine, alive or not.
            ray.init(address="local", include_dashboard=False, **_QUIET)
    except Exception as error:
        raise EngineError(f"no local Ray can be started: {one_line(str(error))}") from error


def _join(address: str, timeout_s: float) -> None:
    if "://" not in address:  # Ray's client has a deadline of its own, of 30 s
        _ask_head(address, timeout_s)
    try:
        ray.init(address=address, **_QUIET)
    except Exception as error:
        raise _refusal(address, str(error)) from error


def _ask_head(address: str, timeout_s: float) -> None:
    """Raises EngineError where the head of a cluster does not answer in time.

    A process of its own asks: where nobody answers, `ray.init` tries for more than ten minutes, deaf to signals.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise _refusal(address, f"no answer for {timeout_s:g} s") from None
    if done.returncode:
        # A traceback, at the end of which is the error: all lines that are not indented.
        raised = takewhile(lambda line: not line.startswith(" "), reversed(done.stderr.rstrip().splitlines()))
        raise _refusal(address, " ".join(reversed(list(raised))))


def _refusal(address: str, reason: str) -> EngineError:
    said = one_line(reason).rstrip(".")
    return EngineError(
        f"the Ray cluster at {address} cannot be joined: {said}; see whether its head runs, and whether engine.address "
        f"and RAY_ADDRESS are right"
    )


def node_resources() -> list[dict[str, float]]:
    """Lists the resources (CPU, GPU and so on) of each node of the connected cluster that is alive."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def plan_actors(job: JobConfig, nodes: Sequence[Mapping[str, float]]) -> ActorPlan:
    """Plans the scoring actors on a cluster. nodes: the resources (CPU, GPU) of each node that is alive.

    With engine.actors auto, each GPU gets engine.actors_per_gpu of them; without GPUs, each node gets one, with all of
    its cores. Raises EngineError where no actor fits.
    """
    gpus = 0 if job.model.device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
    if job.model.device == "cuda" and not gpus:
        raise EngineError("model.device is cuda, but the cluster has no GPU; add GPU nodes or set model.device=auto")
    hosts = [node for node in nodes if (node.get("GPU", 0) if gpus else node.get("CPU", 0)) >= 1]
    if not hosts:
        raise EngineError("the cluster has no node with a free CPU core to score on")
    share = job.engine.actors_per_gpu
    wanted = job.engine.actors if job.engine.actors != "auto" else gpus * share or len(hosts)
    if job.engine.cpus_per_actor != "auto":
        cpus = job.engine.cpus_per_actor
    elif gpus:
        cpus = max(1, min(int(node["CPU"] // (node["GPU"] * share)) for node in hosts))
    else:
        cpus = max(1, min(int(node["CPU"]) for node in hosts) // -(-wanted // len(hosts)))
    room = sum(int(min(node["CPU"] // cpus, node["GPU"] * share if gpus else node["CPU"])) for node in hosts)
    if not room:
        raise EngineError(f"no node has the {cpus} CPU cores that engine.cpus_per_actor asks for")
    if room < wanted:
        logger.warning("the cluster has room for %d scoring actors, not for %d", room, wanted)
    return ActorPlan(min(wanted, room), cpus, 1 / share if gpus else 0)
