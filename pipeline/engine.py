"""Ray: the prompt actor, the scoring actors (one a GPU), and the bounded loop over shards."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import ray
import ray.exceptions
import torch
from ray.util.metrics import Counter, Histogram

from pipeline import prompts as prompt_library
from pipeline.alfa import Detector, PromptEmbeddings, load_encoder, locate_weights
from pipeline.images import HangGuard, give_back_freed_memory
from pipeline.scoring import Shard, ShardStats, Thresholds, build_memory, mask_shard, score_shard
from pipeline.storage import Run, open_store
from schemas.job import JobConfig
from schemas.prompts import PromptEnsemble, PromptSet

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")

_CALLS_AT_ONCE = 2
"""Calls that each actor works on: while one shard has the model, the other reads ahead or writes its last masks."""

_PATIENCE_S = 60.0
"""After so long without any event, the driver looks whether there is anyone to wait for."""


class EngineError(RuntimeError):
    """The cluster cannot do the job; the message says what to do."""


@dataclass(frozen=True)
class ActorPlan:
    """How many scoring actors, and what each holds; actors that share a GPU hold a part of it."""

    count: int
    cpus: int
    gpus: float


class PromptActor:
    """Obtains prompt sets: single flight for each class inside a job. Between jobs the library's leases do the same."""

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
        lease_s = self._job.engine.lease_s
        return prompt_library.obtain(output, class_name, self._job.prompts, owner=self._owner, lease_s=lease_s)


class ScoringActor:
    """One model on one GPU (or on some CPU cores). Shards have it in turns; threads do the I/O around it."""

    def __init__(self, job: JobConfig, weights_sha256: str, source_uri: str, cpus: int) -> None:
        self._job = job
        self._weights_sha256 = weights_sha256
        self._threads = max(4, 2 * cpus)
        self._cpus = cpus
        self._source = open_store(source_uri, job.storage)
        self._output = open_store(job.output.uri, job.storage)
        self._prompts: dict[str, PromptEmbeddings] = {}
        self._turn = threading.Lock()
        self._guard = HangGuard()
        # Ray's own Prometheus endpoint serves these, from each node, as ray_alfa_...
        self._images = Counter("alfa_images", "Images done, by outcome: ok, or the type of error.", ("outcome",))
        self._seconds = Histogram("alfa_shard_seconds", "Time for a shard.", [1, 3, 10, 30, 100, 300, 1000])

    def load(self) -> None:
        """Loads the model; to be called first. What __init__ raises, Ray would report as a death of the actor."""
        weights = locate_weights(self._job.model)
        if weights.sha256 != self._weights_sha256:
            raise EngineError(
                f"{weights.path} on node {socket.gethostname()} is not the file that the run was planned with (SHA-256 "
                f"{weights.sha256[:12]}, planned {self._weights_sha256[:12]}); put the same weights on all nodes"
            )
        torch.set_num_threads(self._cpus)
        give_back_freed_memory()
        encoder = load_encoder(self._job.model, weights)
        self._detector = Detector(encoder, self._job.method, self._job.aligner, self._job.references)

    def embed(self, ensemble: PromptEnsemble, references: Sequence[Mapping[str, Any]], run_id: str) -> PromptEmbeddings:
        """The prompts of a class as embeddings, with the memory of its reference images (manifest rows), if it has any;
        done once a run, for all actors."""
        with self._turn:
            embeddings = self._detector.embed(ensemble)
            if not references:
                return embeddings
            return build_memory(run_id, embeddings, references, self._detector, self._job, self._output)

    def score(
        self, shard: Shard, run: Run, prompts: Mapping[str, ray.ObjectRef[PromptEmbeddings]], isolate: bool
    ) -> ShardStats:
        """score_shard; embeddings are fetched from Ray's object store the first time that a class comes by."""
        for class_name, reference in prompts.items():
            if class_name not in self._prompts:
                self._prompts[class_name] = ray.get(reference)
        started = time.monotonic()
        stats = score_shard(
            shard,
            run,
            self._detector,
            self._prompts,
            self._source,
            self._output,
            self._threads,
            turn=self._turn,
            guard=self._guard,
            isolate=isolate,
        )
        self._seconds.observe(time.monotonic() - started)
        for outcome, count in {**stats.errors, "ok": stats.images - sum(stats.errors.values())}.items():
            if count:
                self._images.inc(count, {"outcome": outcome})
        return stats

    def mask(self, shard_id: str, digest: str, thresholds: Mapping[str, Thresholds], run: Run) -> ShardStats:
        """mask_shard."""
        return mask_shard(shard_id, digest, thresholds, run, self._output, self._threads)


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
    except ray.exceptions.RayActorError as error:
        raise EngineError(f"the prompt actor died more often than engine.max_restarts allows: {error}") from None
    finally:
        ray.kill(actor)


@dataclass(eq=False)
class _Worker:
    """A scoring actor as the driver sees it. load: calls that are under way."""

    actor: Any
    load: int = 0


class ScoringPool:
    """The scoring actors of a run, and the bounded loop that feeds them.

    An actor that dies is replaced, and what it held is done again by whoever is free. Where the node is gone too, the
    new one may find no place: the others do its work.
    """

    def __init__(
        self, run: Run, weights_sha256: str, source_uri: str, actor_class: type[ScoringActor] = ScoringActor
    ) -> None:
        self.plan = plan_actors(run.job, node_resources())
        self._run = run
        self._actor_class = actor_class
        self._arguments = (run.job, weights_sha256, source_uri, self.plan.cpus)
        self._prompts: dict[str, ray.ObjectRef[PromptEmbeddings]] = {}
        self._workers: list[_Worker] = []
        self._starting: dict[Any, _Worker] = {}
        self._deaths = 0  # since a call has ended well
        for _ in range(self.plan.count):
            self._start()

    def close(self) -> None:
        """Stops the actors; what they were scoring is scored again by the next run."""
        for worker in [*self._workers, *self._starting.values()]:
            ray.kill(worker.actor)

    def embed(self, ensembles: Sequence[PromptEnsemble], references: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Encodes all prompts and reference images (manifest rows, by class), once; what comes of them stays in Ray's
        object store for every actor."""

        def submit(actor: Any, ensemble: PromptEnsemble, _: int) -> Any:
            return actor.embed.remote(ensemble, references.get(ensemble.class_name, ()), self._run.run_id)

        for embeddings in self._each(iter(ensembles), submit):
            name, memory = embeddings.ensemble.class_name, embeddings.memory
            shots, wanted = 0 if memory is None else memory.shots, len(references.get(name, ()))
            if shots < wanted:
                logger.warning("only %d of the %d reference images of %s can be read", shots, wanted, name)
            self._prompts[name] = ray.put(embeddings)

    def score(self, shards: Iterator[Shard]) -> Iterator[ShardStats]:
        """Scores shards, in the order in which they finish. One that a worker died over is decoded in isolation."""

        def submit(actor: Any, shard: Shard, deaths: int) -> Any:
            classes = shard.images.column("class_name").unique().to_pylist()
            prompts = {name: self._prompts[name] for name in classes}
            return actor.score.remote(shard, self._run, prompts, isolate=deaths > 0)

        return self._each(shards, submit)

    def mask(self, shard_ids: Iterator[str], digest: str, thresholds: Mapping[str, Thresholds]) -> Iterator[ShardStats]:
        """The second pass: masks of scored shards."""
        shared = ray.put(thresholds)

        def submit(actor: Any, shard_id: str, _: int) -> Any:
            return actor.mask.remote(shard_id, digest, shared, self._run)

        return self._each(shard_ids, submit)

    def _each(self, items: Iterator[_Item], submit: Callable[[Any, _Item, int], Any]) -> Iterator[Any]:
        """The results of submit(actor, item, deaths) for all items, as they come; see _takes_another for who gets them.

        deaths: how many workers have died over the item.
        """
        waiting: deque[tuple[_Item, int]] = deque()
        under_way: dict[Any, tuple[_Worker, _Item, int]] = {}
        while True:
            waiting.extend((item, 0) for item in islice(items, max(0, self.plan.count - len(waiting))))
            if waiting and (worker := self._find_worker(len(waiting))):
                item, deaths = waiting.popleft()
                worker.load += 1
                under_way[submit(worker.actor, item, deaths)] = worker, item, deaths
                continue
            if not waiting and not under_way:
                return
            for reference in self._wait([*under_way, *self._starting]):
                if reference in self._starting:
                    self._receive(reference)
                    continue
                worker, item, deaths = under_way.pop(reference)
                worker.load -= 1
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise _cause(error) from None
                except ray.exceptions.RayError as error:
                    self._replace(worker, error, deaths + 1)
                    waiting.appendleft((item, deaths + 1))
                else:
                    self._deaths = 0
                    yield result

    def _find_worker(self, waiting: int) -> _Worker | None:
        """The worker that takes one of the items that wait; None: they are to go on waiting."""
        worker = min(self._workers, key=lambda one: one.load, default=None)
        return worker if worker is not None and _takes_another(worker.load, waiting, self.plan.count) else None

    def _start(self) -> None:
        options = {"num_cpus": self.plan.cpus, "num_gpus": self.plan.gpus, "max_restarts": 0}
        remote = ray.remote(self._actor_class).options(**options, max_concurrency=_CALLS_AT_ONCE)
        worker = _Worker(remote.remote(*self._arguments))
        self._starting[worker.actor.load.remote()] = worker

    def _receive(self, loaded: Any) -> None:
        """Takes in a worker that has loaded its model."""
        worker = self._starting.pop(loaded)
        self._workers.append(worker)
        try:
            ray.get(loaded)
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except ray.exceptions.RayError as error:
            self._replace(worker, error, 1)

    def _replace(self, worker: _Worker, error: ray.exceptions.RayError, deaths: int) -> None:
        """Starts another worker for one that died. Raises EngineError where that happens too often."""
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        self._deaths += 1
        # One that is merely cut off would go on in the dark.
        ray.kill(worker.actor)
        reason = " ".join(str(error).split())[:400]
        most = self._run.job.engine.max_restarts
        if deaths > most or self._deaths > most * self.plan.count:
            raise EngineError(
                f"{self._deaths} scoring workers died, more than engine.max_restarts ({most}) allows; look at the "
                f"memory of their nodes and at Ray's logs. The last: {reason}"
            )
        logger.warning("a scoring worker died and is replaced; its shards are scored again: %s", reason)
        self._start()

    def _wait(self, references: list[Any]) -> list[Any]:
        while True:
            done, _ = ray.wait(references, num_returns=1, timeout=_PATIENCE_S)
            if done:
                return list(done)
            if not self._workers:
                logger.warning(
                    "no scoring actor has started; waiting for nodes that have %d CPU cores and %g GPUs for one",
                    self.plan.cpus,
                    self.plan.gpus,
                )


def _takes_another(load: int, waiting: int, actors: int) -> bool:
    """Whether a worker with `load` calls takes one of the items that wait; actors: as many as are planned.

    A second one only while every other actor, those that still start too, can have one: the last items wait for
    whoever is free, not behind a busy model while another has nothing to do.
    """
    return load == 0 or (load < _CALLS_AT_ONCE and waiting >= actors)


def _cause(error: ray.exceptions.RayTaskError) -> Exception:
    """Our own exception of a remote call."""
    return error.cause if isinstance(error.cause, Exception) else EngineError(str(error))
