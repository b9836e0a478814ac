"""The scoring pool: starts as many actors as the cluster and the work allow, and feeds them with shards.

Actors that have no node yet make an autoscaler add nodes. They belong to the driver, so Ray drops the request when the
driver ends in any way. A request by Ray's `request_resources` would outlive a driver that is killed.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import ray
import ray.exceptions

from pipeline.engine import internals
from pipeline.engine.actors import ClassSetup, ScoringActor
from pipeline.engine.cluster import is_local
from pipeline.engine.errors import EngineError, cause_of, reason_of
from pipeline.engine.head import REFRESH_EVERY_S
from pipeline.engine.plan import ActorPlan, away_from, wanted_actors
from pipeline.engine.relay import unpack
from pipeline.engine.view import ClusterView
from pipeline.scoring import Neighbours, Shard, ShardStats, Thresholds, fixed_thresholds
from pipeline.storage import DiskError, Run
from schemas.prompts import PromptEnsemble

logger = logging.getLogger(__name__)

_CALLS_AT_ONCE = 2
"""Concurrent calls per actor: while one shard uses the model, another reads its images or writes its last masks."""

_LOSS_NOTICED_WITHIN_S = 30.0
"""Seconds within which Ray notices that a node is lost. Until then, the deaths of its workers look unexplained."""

_FAILED_STARTS = 2
"""So many workers in a row may die on a node before they are ready. Then it is excluded if another can do the work."""

_STRAGGLER_FACTOR = 1.5
"""A call that takes this many times the median time is tried a second time, on an idle actor."""


@dataclass(eq=False)
class _Worker:
    """A scoring actor, as the driver knows it.

    node_id: None until Ray has found a node for it. ready: whether it has loaded its model. load: number of its running
    calls. stopped: whether the driver has stopped it, because it is not needed any more.
    """

    actor: Any
    plan: ActorPlan
    node_id: str | None = None
    ready: bool = False
    load: int = 0
    stopped: bool = False


@dataclass(eq=False)
class _Task:
    """An item of work.

    size: how much work it is, compared with the others. deaths: the nodes on which workers died over it. tries: number
    of its running calls.
    """

    item: Any
    size: int = 1
    deaths: list[str | None] = field(default_factory=list)
    tries: int = 0
    done: bool = False


@dataclass(frozen=True)
class _Call:
    """A running call of a task. started: time.monotonic() at its start."""

    worker: _Worker
    task: _Task
    started: float


class ScoringPool:
    """The scoring actors of a run, and the bounded loop that feeds them.

    There are as many actors as the nodes have room for, including nodes that join later, but no more than there is work
    for. An actor that dies is replaced, and another one scores its shards again. A node on which actors cannot start or
    load the model, or whose disk is full, is excluded while others work.

    placed: the largest number of actors that have had a node at the same time.
    """

    def __init__(
        self,
        run: Run,
        weights_sha256: str,
        source_uri: str,
        shards: int,
        actor_class: type[ScoringActor] = ScoringActor,
    ) -> None:
        """shards: number of shards left to score. Raises EngineError where a local Ray cannot run an actor."""
        self.placed = ActorPlan(0, 1, 0)
        self._run = run
        self._view = ClusterView(run.job)
        self._shards = shards
        self._actor_class = actor_class
        self._arguments = (run.job, weights_sha256, source_uri)
        self._setups: dict[str, ray.ObjectRef[ClassSetup]] = {}
        self._workers: list[_Worker] = []
        self._starting: dict[Any, _Worker] = {}
        self._calls: dict[Any, _Call] = {}  # those that run, also needless ones of an earlier pass
        self._deaths: list[str | None] = []  # nodes of the workers that died since the last successful call
        self._failed_starts: Counter[str] = Counter()  # by node, since a worker was ready there
        self._resize(shards)

    @property
    def plan(self) -> ActorPlan:
        """The actors that fit now."""
        return self._view.plan

    @property
    def alive(self) -> int:
        """The number of actors that have a node now."""
        return sum(worker.node_id is not None for worker in self._workers)

    def close(self) -> None:
        """Stops the actors. Unfinished shards are left to the next job that works on the run."""
        for worker in list(self._workers):
            self._stop(worker)

    def embed(self, ensembles: Sequence[PromptEnsemble], neighbours: Mapping[str, Neighbours]) -> None:
        """Encodes the prompts of all classes and puts them into Ray's object store. Call it before score().

        neighbours: by class, the photos that its images are compared with; actors read them when they first need them.
        """

        def submit(actor: Any, ensemble: PromptEnsemble, _: int) -> Any:
            return _call(actor, "embed", ensemble)

        for embeddings in self._each(iter(ensembles), len(ensembles), submit, self._shards):
            name = embeddings.ensemble.class_name
            self._setups[name] = ray.put(ClassSetup(embeddings, neighbours.get(name, Neighbours())))

    def score(self, shards: Iterator[Shard]) -> Iterator[ShardStats]:
        """Scores shards, and yields their stats in the order in which they finish.

        If a worker died over a shard, each of its images is decoded in a process of its own on the next try.
        """

        def submit(actor: Any, shard: Shard, deaths: int) -> Any:
            classes = shard.images.column("class_name").unique().to_pylist()
            setups = {name: self._setups[name] for name in classes}
            return _call(actor, "score", shard, self._run, setups, deaths > 0)

        def count_images(shard: Shard) -> int:
            return max(1, len(shard.images))

        masks_follow = fixed_thresholds(self._run.job) is None
        return self._each(shards, self._shards, submit, self._shards if masks_follow else 0, count_images)

    def mask(self, shard_ids: Sequence[str], digest: str, thresholds: Mapping[str, Thresholds]) -> Iterator[ShardStats]:
        """Makes the masks of scored shards, and yields their stats as they finish. digest: of the thresholds."""
        shared = ray.put(thresholds)

        def submit(actor: Any, shard_id: str, _: int) -> Any:
            return _call(actor, "mask", shard_id, digest, shared, self._run)

        return self._each(iter(shard_ids), len(shard_ids), submit, 0)

    def _each(
        self,
        items: Iterator[Any],
        count: int,
        submit: Callable[[Any, Any, int], Any],
        afterwards: int,
        size: Callable[[Any], int] = lambda _: 1,
    ) -> Iterator[Any]:
        """Yields the results of submit(actor, item, deaths) for all items, in the order in which they finish.

        count: number of items, or more. deaths: number of workers that died over the item, without those of lost nodes.
        afterwards: number of items that other calls of this method will bring later. size: how much work an item is.
        """
        waiting: deque[_Task] = deque()
        calls = self._calls
        taken: deque[float] = deque(maxlen=99)
        while True:
            room = max(0, len(self._workers) + 1 - len(waiting))
            more = [_Task(item, size(item)) for item in islice(items, room)]
            count = count - room if len(more) == room else 0
            waiting += more
            once = [] if waiting else [call for call in calls.values() if call.task.tries == 1 and not call.task.done]
            self._resize(len(waiting) + count + afterwards, spare=len(once))
            worker = self._find_worker(len(waiting))
            task = self._find_task(waiting, once, worker, taken)
            if worker and task:
                worker.load += 1
                task.tries += 1
                reference = submit(worker.actor, task.item, len(self._view.unexplained(task.deaths)))
                calls[reference] = _Call(worker, task, time.monotonic())
                continue
            if not waiting and all(call.task.done for call in calls.values()):
                break
            for reference in self._wait([*calls, *self._starting], soon=bool(once and worker)):
                if reference in self._starting:
                    self._receive(reference)
                    continue
                if reference not in calls:
                    continue
                call = calls.pop(reference)
                call.worker.load -= 1
                call.task.tries -= 1
                try:
                    result = unpack(ray.get(reference))
                except ray.exceptions.RayTaskError as error:
                    if not call.task.done:  # else another try has succeeded
                        self._exclude_node(call.worker, cause_of(error))
                except ray.exceptions.RayError as error:
                    self._replace_dead(call.worker, error, call.task)
                else:
                    self._deaths.clear()
                    if not call.task.done:
                        taken.append((time.monotonic() - call.started) / call.task.size)
                        call.task.done = True
                        yield result
                    continue
                if not call.task.done and not call.task.tries:
                    waiting.appendleft(call.task)
        if not afterwards:  # else the workers of needless second tries keep their models for what follows
            for call in calls.values():
                self._stop(call.worker)

    def _find_worker(self, waiting: int) -> _Worker | None:
        """Finds the worker that takes the next task; None if all are busy. waiting: number of waiting tasks."""
        ready = [worker for worker in self._workers if worker.ready]
        worker = min(ready, key=lambda one: one.load, default=None)
        return worker if worker and _takes_another(worker.load, waiting, len(self._workers)) else None

    def _find_task(
        self, waiting: deque[_Task], once: Sequence[_Call], worker: _Worker | None, taken: Sequence[float]
    ) -> _Task | None:
        """Takes the next waiting task for a worker. If none waits, returns the slowest running one if it straggles.

        once: calls that could be tried a second time. taken: seconds that the last successful calls have taken, divided
        by the sizes of their items.
        """
        if worker is None:
            return None
        if waiting:
            return waiting.popleft()
        now = time.monotonic()

        def pace(call: _Call) -> float:
            return (now - call.started) / call.task.size

        slowest = max((call for call in once if call.worker is not worker), key=pace, default=None)
        if slowest and taken and pace(slowest) > _STRAGGLER_FACTOR * statistics.median(taken):
            return slowest.task
        return None

    def _resize(self, left: int, spare: int = 0) -> None:
        """Starts actors, or stops idle ones, which would keep an autoscaler from removing their nodes.

        left: number of items that no worker has. spare: number of workers that second tries may need.
        """
        self._view.refresh_when_due()
        if self._view.silent or not self._view.decided:
            return
        plan = self.plan
        for worker in [one for one in self._workers if one.node_id is None]:
            if (worker.plan.cpus, worker.plan.gpus) != (plan.cpus, plan.gpus):
                self._stop(worker)
        busy = sum(worker.load > 0 for worker in self._workers)
        placed = self.alive
        if placed > self.placed.count:
            self.placed = replace(plan, count=placed)
        engine = self._run.job.engine
        surplus = len(self._workers) - wanted_actors(engine, plan, placed, busy + left + spare, self._view.grows)
        for _ in range(-surplus):
            self._start()
        if surplus > 0:
            idle = [worker for worker in self._workers if not worker.load]
            for worker in sorted(idle, key=lambda one: (one.ready, one.node_id is not None))[:surplus]:
                self._stop(worker)

    def _start(self) -> None:
        engine, plan = self._run.job.engine, self.plan
        options: dict[str, Any] = {"num_cpus": plan.cpus, "num_gpus": plan.gpus, "resources": engine.resources}
        if labels := {**engine.labels, **away_from(self._view.excluded)}:
            options["label_selector"] = labels
        remote = ray.remote(self._actor_class).options(**options, max_restarts=0, max_concurrency=_CALLS_AT_ONCE)
        worker = _Worker(remote.remote(*self._arguments, plan.cpus), replace(plan, count=0))
        self._workers.append(worker)
        self._starting[_call(worker.actor, "settle", worker.plan)] = worker

    def _stop(self, worker: _Worker) -> None:
        worker.stopped = True
        if worker in self._workers:
            self._workers.remove(worker)
        self._starting = {reference: one for reference, one in self._starting.items() if one is not worker}
        ray.kill(worker.actor)

    def _receive(self, reference: Any) -> None:
        """Handles a worker that has got its node (then it loads its model), or has loaded its model."""
        worker = self._starting.pop(reference)
        try:
            result = unpack(ray.get(reference))
        except ray.exceptions.RayTaskError as error:
            self._exclude_node(worker, cause_of(error), of_node=True)
        except ray.exceptions.RayError as error:
            self._replace_dead(worker, error)
        else:
            if worker.node_id is None:
                worker.node_id = result
                self._starting[_call(worker.actor, "load")] = worker
            else:
                worker.ready = True
                self._failed_starts.pop(worker.node_id, None)

    def _exclude_node(self, worker: _Worker, cause: Exception, of_node: bool = False) -> None:
        """Excludes the node of a worker whose call failed. Raises the cause if the node is not to blame, or if no other
        node can do the work.

        of_node: whether the failed call did not depend on an item of work.
        """
        if worker.stopped:
            return
        if not of_node and not isinstance(cause, (DiskError, ray.exceptions.OutOfDiskError)):
            raise cause from None
        if worker.node_id is None or not self._view.has_room_beside(worker.node_id):
            raise cause from None
        self._exclude(worker.node_id, str(cause))

    def _exclude(self, node_id: str, reason: str) -> None:
        logger.warning("node %s is excluded, and others do its work: %s", node_id[:12], reason)
        self._view.exclude(node_id)
        for one in [one for one in self._workers if one.node_id == node_id]:
            self._stop(one)

    def _replace_dead(self, worker: _Worker, error: ray.exceptions.RayError, task: _Task | None = None) -> None:
        """Replaces a worker that died. Raises EngineError if workers die too often.

        Deaths on lost nodes do not count: when a spot node is taken away, its healthy workers die with it.
        """
        if worker.stopped:
            return
        self._view.refresh()
        if worker.node_id is None and not self._view.silent:
            worker.node_id = internals.node_of(worker.actor)
        reason = reason_of(error)
        if task:
            task.deaths.append(worker.node_id)
        if worker in self._workers:
            # The actor may only be unreachable, and would then go on working.
            self._stop(worker)
            worker.stopped = False
            self._deaths.append(worker.node_id)
            where = "" if self._view.unexplained([worker.node_id]) else " with its node"
            logger.warning("a scoring worker died%s and is replaced; its shards are scored again: %s", where, reason)
            if not worker.ready:
                self._count_failed_start(worker.node_id, reason)
        patience = time.monotonic() + (0 if is_local(self._run.job) else _LOSS_NOTICED_WITHIN_S)
        while self._too_many(task):
            if time.monotonic() >= patience:
                most = self._run.job.engine.max_restarts
                count = len(self._view.unexplained(self._deaths))
                raise EngineError(
                    f"{count} scoring workers died, more than engine.max_restarts ({most}) allows; check the memory of "
                    f"their nodes, and Ray's logs. The last: {reason}"
                )
            time.sleep(1)
            self._view.refresh()

    def _count_failed_start(self, node_id: str | None, reason: str) -> None:
        """Excludes a node on which workers die again and again before they are ready. None: the node is not known."""
        if node_id is None:
            return
        self._failed_starts[node_id] += 1
        failed = self._failed_starts[node_id]
        if failed >= _FAILED_STARTS and self._view.unexplained([node_id]) and self._view.has_room_beside(node_id):
            said = f"{failed} workers died there before they were ready; check its disk and memory. The last: {reason}"
            self._exclude(node_id, said)

    def _too_many(self, task: _Task | None) -> bool:
        """Whether more workers have died, in all or over this task, than engine.max_restarts allows."""
        most = self._run.job.engine.max_restarts
        over_task = self._view.unexplained(task.deaths) if task else []
        return len(over_task) > most or len(self._view.unexplained(self._deaths)) > most * max(self.plan.count, 1)

    def _wait(self, references: list[Any], soon: bool) -> list[Any]:
        """Waits until a call is done. Returns the finished calls; none after 5 s, or 0.2 s if `soon`."""
        self._view.await_node(self.alive > 0)
        timeout = 0.2 if soon else REFRESH_EVERY_S
        if not references:
            time.sleep(timeout)
            return []
        done, _ = ray.wait(references, num_returns=1, timeout=timeout)
        return list(done)


def _call(actor: Any, method: str, *arguments: Any) -> Any:
    """Starts a call of an actor's method, and returns the reference of its Reply. Ray's dashboard shows the method."""
    return actor.call.options(name=f"ScoringActor.{method}").remote(method, *arguments)


def _takes_another(load: int, waiting: int, actors: int) -> bool:
    """Whether a worker with `load` running calls takes one of the `waiting` items. actors: number of all actors.

    A worker takes a second item only if there is one for every other actor, including those that are still starting.
    So the last items go to the actor that is free first, and do not wait for a busy one while another is idle.
    """
    return load == 0 or (load < _CALLS_AT_ONCE and waiting >= actors)
