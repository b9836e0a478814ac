"""Which cluster a job uses, and how many actors of what size it starts there."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from pipeline.engine.errors import EngineError
from schemas.job import JobConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ActorPlan:
    """How many scoring actors, and what each holds; actors that share a GPU hold a part of it."""

    count: int
    cpus: int
    gpus: float


@contextlib.contextmanager
def connect(job: JobConfig) -> Iterator[None]:
    """Joins the Ray cluster of the job, or starts a local one for its duration."""
    # Factories have closed networks, and a driver's environment never belongs in a cluster's metadata.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        yield
        return
    joins = bool(job.engine.address or os.environ.get("RAY_ADDRESS"))
    with contextlib.nullcontext() if joins else _loopback_only():
        options: dict[str, Any] = {} if joins else {"include_dashboard": False}
        ray.init(address=job.engine.address, logging_level=logging.WARNING, **options)
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Servers of a Ray that is started inside listen on 127.0.0.1 alone, not on all interfaces.

    Ray has one switch for it, made for macOS and Windows and read at its import: the constant is for this process, the
    variable for those that it starts.
    """
    variable = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before, constants = os.environ.get(variable), ray._private.ray_constants
    clusters = constants.ENABLE_RAY_CLUSTER
    os.environ[variable], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = clusters
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def node_resources() -> list[dict[str, float]]:
    """CPU and GPU of each node alive of the connected cluster."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def plan_actors(job: JobConfig, nodes: Sequence[Mapping[str, float]]) -> ActorPlan:
    """What to start on a cluster; nodes: the resources (CPU, GPU) of each one alive.

    auto: engine.actors_per_gpu to each GPU; without GPUs one a node, with all its cores. Raises EngineError where none
    would fit.
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
