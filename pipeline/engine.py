"""Ray: the prompt actor, the scoring actors (one a GPU), and the bounded loop over shards."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import torch

from pipeline import prompts as prompt_library
from pipeline.alfa import Detector, PromptEmbeddings, Weights, load_encoder, locate_weights
from pipeline.scoring import Run, ShardStats, Thresholds, mask_shard, score_shard
from pipeline.shards import Shard
from pipeline.storage import open_store
from schemas.job import JobConfig
from schemas.prompts import PromptEnsemble, PromptSet

logger = logging.getLogger(__name__)

_SHARDS_AHEAD = 2
"""Shards that wait at each actor, so that it never waits for the driver."""


class EngineError(RuntimeError):
    """The cluster cannot do the job; the message says what to do."""


@dataclass(frozen=True)
class ActorPlan:
    """How many scoring actors, and what each holds."""

    count: int
    cpus: int
    gpus: int


class PromptActor:
    """Obtains prompt sets: single flight for each class inside a job. Between jobs the library's claims do the same."""

    def __init__(self, job: JobConfig, owner: str) -> None:
        self._job = job
        self._owner = owner
        self._flights: dict[str, asyncio.Task[PromptSet]] = {}

    async def obtain(self, class_name: str) -> PromptSet:
        """The prompt set of a class; callers of the same class share one call. Raises LLMError, PromptLibraryError."""
        flight = self._flights.get(class_name)
        if flight is None or (flight.done() and flight.exception() is not None):
            flight = asyncio.create_task(asyncio.to_thread(self._obtain, class_name))
            self._flights[class_name] = flight
        return await asyncio.shield(flight)

    def _obtain(self, class_name: str) -> PromptSet:
        output = open_store(self._job.output.uri, self._job.storage)
        return prompt_library.obtain(output, class_name, self._job.prompts, owner=self._owner)


class ScoringActor:
    """One model on one GPU (or on some CPU cores). It scores one shard at a time; threads inside it do the I/O."""

    def __init__(self, job: JobConfig, weights_sha256: str, source_uri: str, cpus: int) -> None:
        weights = locate_weights(job.model)
        if weights.sha256 != weights_sha256:
            raise EngineError(
                f"{weights.path} on node {socket.gethostname()} is not the file that the run was planned with "
                f"(SHA-256 {weights.sha256[:12]}, planned {weights_sha256[:12]}); put the same weights on all nodes"
            )
        torch.set_num_threads(cpus)
        self._threads = max(4, 2 * cpus)
        self._detector = Detector(load_encoder(job.model, weights), job.method, job.aligner)
        self._source = open_store(source_uri, job.storage)
        self._output = open_store(job.output.uri, job.storage)
        self._prompts: dict[str, PromptEmbeddings] = {}

    def embed(self, ensemble: PromptEnsemble) -> PromptEmbeddings:
        """The prompts of a class as embeddings; done once a run, by one actor, for all."""
        return self._detector.embed(ensemble)

    def score(self, shard: Shard, run: Run, prompts: Mapping[str, ray.ObjectRef[PromptEmbeddings]]) -> ShardStats:
        """score_shard; embeddings are fetched from Ray's object store the first time that a class comes by."""
        for class_name, reference in prompts.items():
            if class_name not in self._prompts:
                self._prompts[class_name] = ray.get(reference)
        return score_shard(shard, run, self._detector, self._prompts, self._source, self._output, self._threads)

    def mask(self, shard_id: str, folder: str, thresholds: Mapping[str, Thresholds], run: Run) -> ShardStats:
        """mask_shard."""
        return mask_shard(shard_id, folder, thresholds, run, self._output, self._threads)


@contextlib.contextmanager
def connect(job: JobConfig) -> Iterator[None]:
    """Joins the Ray cluster of the job, or starts a local one for its duration."""
    # Factories have closed networks, and a driver's environment never belongs in a cluster's metadata.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(address=job.engine.address, logging_level=logging.WARNING, **_local_options(job))
    try:
        yield
    finally:
        if started_here:
            ray.shutdown()


def _local_options(job: JobConfig) -> dict[str, Any]:
    joins = job.engine.address or os.environ.get("RAY_ADDRESS")
    return {} if joins else {"include_dashboard": False}


def node_resources() -> list[dict[str, float]]:
    """CPU and GPU of each node alive of the connected cluster."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def plan_actors(job: JobConfig, nodes: Sequence[Mapping[str, float]]) -> ActorPlan:
    """What to start on a cluster; nodes: the resources (CPU, GPU) of each one alive.

    auto: one actor a GPU; without GPUs one a node, with all its cores. Raises EngineError where none would fit.
    """
    gpus = 0 if job.model.device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
    if job.model.device == "cuda" and not gpus:
        raise EngineError("model.device is cuda, but the cluster has no GPU; add GPU nodes or set model.device=auto")
    hosts = [node for node in nodes if (node.get("GPU", 0) if gpus else node.get("CPU", 0)) >= 1]
    if not hosts:
        raise EngineError("the cluster has no node with a free CPU core to score on")
    wanted = job.engine.actors if job.engine.actors != "auto" else gpus or len(hosts)
    if job.engine.cpus_per_actor != "auto":
        cpus = job.engine.cpus_per_actor
    elif gpus:
        cpus = max(1, min(int(node["CPU"] // node["GPU"]) for node in hosts))
    else:
        cpus = max(1, min(int(node["CPU"]) for node in hosts) // -(-wanted // len(hosts)))
    room = sum(int(min(node["CPU"] // cpus, node["GPU"] if gpus else node["CPU"])) for node in hosts)
    if not room:
        raise EngineError(f"no node has the {cpus} CPU cores that engine.cpus_per_actor asks for")
    if room < wanted:
        logger.warning("the cluster has room for %d scoring actors, not for %d", room, wanted)
    return ActorPlan(min(wanted, room), cpus, 1 if gpus else 0)


def obtain_prompts(job: JobConfig, classes: Sequence[str], owner: str) -> list[PromptSet]:
    """The prompt sets of the classes, by the job's prompt actor."""
    actor: Any = (
        ray.remote(PromptActor)
        .options(name=f"alfa-prompts-{owner}", num_cpus=0, max_restarts=job.engine.max_restarts, max_task_retries=-1)
        .remote(job, owner)
    )
    try:
        return list(ray.get([actor.obtain.remote(class_name) for class_name in classes]))
    except ray.exceptions.RayTaskError as error:
        raise _cause(error) from None
    finally:
        ray.kill(actor)


class ScoringPool:
    """The scoring actors of a run, and the bounded loop that feeds them."""

    def __init__(self, run: Run, weights: Weights, source_uri: str) -> None:
        job = run.job
        plan = plan_actors(job, node_resources())
        remote = ray.remote(ScoringActor).options(
            num_cpus=plan.cpus,
            num_gpus=plan.gpus,
            max_restarts=job.engine.max_restarts,
            max_task_retries=job.engine.max_restarts,
        )
        self._run = run
        self._actors: list[Any] = [remote.remote(job, weights.sha256, source_uri, plan.cpus) for _ in range(plan.count)]
        self._prompts: dict[str, ray.ObjectRef[PromptEmbeddings]] = {}
        self.plan = plan

    def close(self) -> None:
        """Stops the actors; what they were scoring is scored again by the next run."""
        for actor in self._actors:
            ray.kill(actor)

    def embed(self, ensembles: Sequence[PromptEnsemble]) -> None:
        """Encodes all prompts, once; the embeddings stay in Ray's object store for every actor."""
        references = {item.class_name: self._actors[0].embed.remote(item) for item in ensembles}
        try:
            ray.get(list(references.values()))
        except ray.exceptions.RayError as error:
            raise _cause(error) from None
        self._prompts = references

    def score(self, shards: Iterator[Shard]) -> Iterator[ShardStats]:
        """Scores shards, in the order in which they finish; at most two wait at each actor."""

        def submit(actor: Any, shard: Shard) -> Any:
            classes = shard.images.column("class_name").unique().to_pylist()
            return actor.score.remote(shard, self._run, {name: self._prompts[name] for name in classes})

        return self._each(shards, submit)

    def mask(self, shard_ids: Iterator[str], folder: str, thresholds: Mapping[str, Thresholds]) -> Iterator[ShardStats]:
        """The second pass: masks of scored shards."""
        shared = ray.put(thresholds)
        return self._each(shard_ids, lambda actor, shard: actor.mask.remote(shard, folder, shared, self._run))

    def _each(self, items: Iterator[Any], submit: Any) -> Iterator[ShardStats]:
        idle = deque(self._actors * _SHARDS_AHEAD)
        under_way: dict[Any, Any] = {}
        while True:
            while idle and (item := next(items, None)) is not None:
                actor = idle.popleft()
                under_way[submit(actor, item)] = actor
            if not under_way:
                return
            done, _ = ray.wait(list(under_way), num_returns=1)
            for reference in done:
                idle.append(under_way.pop(reference))
                try:
                    stats: ShardStats = ray.get(reference)
                except ray.exceptions.RayError as error:
                    raise _cause(error) from None
                yield stats


def _cause(error: ray.exceptions.RayError) -> Exception:
    """Our own exception of a remote call, or what a dead actor means for the person on call."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return error.cause if isinstance(error.cause, Exception) else EngineError(str(error))
    if isinstance(error, ray.exceptions.ActorDiedError) and "EngineError" in str(error):
        return EngineError(str(error).strip().splitlines()[-1])
    return EngineError(
        f"a worker died more often than engine.max_restarts allows ({type(error).__name__}); look at its node's memory "
        f"and at Ray's logs, then run the same command again: finished shards are kept. {str(error)[:500]}"
    )
