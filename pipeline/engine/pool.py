"""The scoring pool: a bounded loop that feeds actors with shards, and as many actors as the cluster and the work allow.

Actors that have no node yet are what asks an autoscaler for nodes. They belong to the driver, so that Ray forgets them
however it ends; Ray's other way (`request_resources`) would outlive a driver that is killed.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import ray
import ray.exceptions

from pipeline.engine.actors import ClassSetup, ScoringActor
from pipeline.engine.cluster import can_grow, is_local, list_nodes
from pipeline.engine.errors import EngineError, cause_of
from pipeline.engine.plan import (
    ActorPlan,
    Node,
    describe_need,
    describe_nodes,
    plan_actors,
    require_room,
    uses_gpus,
    wanted_actors,
)
from pipeline.engine.relay import unpack
from pipeline.scoring import Neighbours, Shard, ShardStats, Thresholds, fixed_thresholds
from pipeline.storage import DiskError, Run
from schemas.prompts import PromptEnsemble

logger = logging.getLogger(__name__)

_CALLS_AT_ONCE = 2
"""Calls that an actor works on at the same time: while one shard uses the model, another reads its images or writes its
last masks."""

_LOOK_EVERY_S = 5.0
"""How often the driver looks which nodes there are."""

_SAY_EVERY_S = 60.0
"""How often the driver says that it waits for nodes."""

_NOTICED_WITHIN_S = 30.0
"""For so long Ray may not have noticed that a node is gone whose workers are."""

_STRAGGLES = 1.5
"""A call that takes so many times the usual time is tried a second time, on an actor that has nothing else to do."""


@dataclass(eq=False)
class _Worker:
    """A scoring actor, as the driver knows it. node_id: None until Ray has found a node for it. ready: it has its
    model. load: how many of its calls are under way. stopped: by the driver, which needs it no longer."""

    actor: Any
    plan: ActorPlan
    node_id: str | None = None
    ready: bool = False
    load: int = 0
    stopped: bool = False


@dataclass(eq=False)
class _Task:
    """An item of work. deaths: on which nodes workers died over it. tries: how many calls of it are under way."""

    item: Any
    deaths: list[str | None] = field(default_factory=list)
    tries: int = 0
    done: bool = False


@dataclass(frozen=True)
class _Call:
    """A try at a task. started: by time.monotonic."""

    worker: _Worker
    task: _Task
    started: float


class ScoringPool:
    """The scoring actors of a run, and the bounded loop that feeds them.

    There are as many actors as nodes have room for, of those too that come later, and no more than there is work for.
    An actor that dies is replaced, and another one scores its shards again. A node on which none can load its model,
    or whose disk is full, is left out while others work.

    plan: what there is room for now. placed: what has been there at most at the same time.
    """

    def __init__(
        self,
        run: Run,
        weights_sha256: str,
        source_uri: str,
        shards: int,
        actor_class: type[ScoringActor] = ScoringActor,
    ) -> None:
        """shards: how many are left to score. Raises EngineError where a local Ray has no room for an actor."""
        self.plan = self.placed = ActorPlan(0, 1, 0)
        self._run = run
        self._shards = shards
        self._actor_class = actor_class
        self._arguments = (run.job, weights_sha256, source_uri)
        self._setups: dict[str, ray.ObjectRef[ClassSetup]] = {}
        self._workers: list[_Worker] = []
        self._starting: dict[Any, _Worker] = {}
        self._deaths: list[str | None] = []  # since a call has ended well
        self._left_out: set[str] = set()
        self._nodes: list[Node] = []
        self._on_gpus: bool | None = None  # not to be said before a node is there
        self._grows = False
        self._looked = self._said = self._homeless_from = time.monotonic()
        self._look()
        self._resize(shards)

    def close(self) -> None:
        """Stops the actors. Shards that are not finished are left to the next job that works on the run."""
        for worker in list(self._workers):
            self._stop(worker)

    def embed(self, ensembles: Sequence[PromptEnsemble], neighbours: Mapping[str, Neighbours]) -> None:
        """Encodes the prompts of all classes, once, and puts the embeddings where every actor can fetch them (Ray's
        object store). To be called before score().

        neighbours: by class, the photos that its images are compared with. They are read when its first shard is due.
        """

        def submit(actor: Any, ensemble: PromptEnsemble, _: int) -> Any:
            return _call(actor, "embed", ensemble)

        for embeddings in self._each(iter(ensembles), len(ensembles), submit, self._shards):
            name = embeddings.ensemble.class_name
            self._setups[name] = ray.put(ClassSetup(embeddings, neighbours.get(name, Neighbours())))

    def score(self, shards: Iterator[Shard]) -> Iterator[ShardStats]:
        """Scores shards, and yields their stats in the order in which they finish.

        A shard over which a worker died is decoded image by image, each in a process of its own.
        """

        def submit(actor: Any, shard: Shard, deaths: int) -> Any:
            classes = shard.images.column("class_name").unique().to_pylist()
            setups = {name: self._setups[name] for name in classes}
            return _call(actor, "score", shard, self._run, setups, deaths > 0)

        masks_follow = fixed_thresholds(self._run.job) is None
        return self._each(shards, self._shards, submit, self._shards if masks_follow else 0)

    def mask(self, shard_ids: Sequence[str], digest: str, thresholds: Mapping[str, Thresholds]) -> Iterator[ShardStats]:
        """Makes the masks of shards that are scored, once their thresholds are known; yields stats as they finish."""
        shared = ray.put(thresholds)

        def submit(actor: Any, shard_id: str, _: int) -> Any:
            return _call(actor, "mask", shard_id, digest, shared, self._run)

        return self._each(iter(shard_ids), len(shard_ids), submit, 0)

    def _each(
        self, items: Iterator[Any], count: int, submit: Callable[[Any, Any, int], Any], afterwards: int
    ) -> Iterator[Any]:
        """Yields the results of submit(actor, item, deaths) for all items, as they come.

        count: how many items there are. deaths: how many workers have died over the item, but for those whose nodes
        are gone. afterwards: how many items come after these, in other calls of this method.
        """
        waiting: deque[_Task] = deque()
        calls: dict[Any, _Call] = {}
        taken: deque[float] = deque(maxlen=99)
        while True:
            for item in islice(items, max(0, len(self._workers) + 1 - len(waiting))):
                waiting.append(_Task(item))
                count -= 1
            once = [] if waiting else [call for call in calls.values() if call.task.tries == 1 and not call.task.done]
            self._resize(len(waiting) + max(count, 0) + afterwards, spare=len(once))
            worker = self._find_worker(len(waiting))
            task = self._find_task(waiting, once, worker, taken)
            if worker and task:
                worker.load += 1
                task.tries += 1
                reference = submit(worker.actor, task.item, len(self._counted(task.deaths)))
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
                    self._leave_out(call.worker, cause_of(error))
                except ray.exceptions.RayError as error:
                    self._bury(call.worker, error, call.task)
                else:
                    self._deaths.clear()
                    taken.append(time.monotonic() - call.started)
                    if not call.task.done:
                        call.task.done = True
                        yield result
                    continue
                if not call.task.done and not call.task.tries:
                    waiting.appendleft(call.task)
        for call in calls.values():  # second tries that nobody waits for
            self._stop(call.worker)

    def _find_worker(self, waiting: int) -> _Worker | None:
        """Finds the worker that takes a task; None where all that wait have to go on waiting."""
        ready = [worker for worker in self._workers if worker.ready]
        worker = min(ready, key=lambda one: one.load, default=None)
        return worker if worker and _takes_another(worker.load, waiting, len(self._workers)) else None

    def _find_task(
        self, waiting: deque[_Task], once: Sequence[_Call], worker: _Worker | None, taken: Sequence[float]
    ) -> _Task | None:
        """The next task for a worker; where none waits, the one that is under way for the longest, if it straggles."""
        if worker is None:
            return None
        if waiting:
            return waiting.popleft()
        slowest = min((call for call in once if call.worker is not worker), key=lambda call: call.started, default=None)
        if slowest and taken and time.monotonic() - slowest.started > _STRAGGLES * statistics.median(taken):
            return slowest.task
        return None

    def _look(self) -> None:
        """Looks which nodes there are, and what actors they have room for."""
        job = self._run.job
        self._looked = time.monotonic()
        self._grows = can_grow(job)
        self._nodes = [node for node in list_nodes() if node.node_id not in self._left_out]
        if self._on_gpus is None:
            on_gpus = uses_gpus(job, self._nodes, self._grows)
            # Where no node is there yet, the first one says whether it is CPU or GPU; never both in one night.
            if on_gpus or is_local(job) or plan_actors(job, self._nodes, on_gpus).count:
                self._on_gpus = on_gpus
        self.plan = plan_actors(job, self._nodes, bool(self._on_gpus))
        if is_local(job):
            require_room(job, self.plan, self._nodes)
        for worker in [one for one in self._workers if one.node_id is None]:
            if (worker.plan.cpus, worker.plan.gpus) != (self.plan.cpus, self.plan.gpus):
                self._stop(worker)

    def _resize(self, left: int, spare: int = 0) -> None:
        """Starts or stops actors. left: items that no worker has. spare: workers that may be needed for second tries.

        Idle ones are stopped, because they would keep their nodes from going.
        """
        if time.monotonic() - self._looked >= _LOOK_EVERY_S:
            self._look()
        if self._on_gpus is None:
            return
        busy = sum(worker.load > 0 for worker in self._workers)
        placed = sum(worker.node_id is not None for worker in self._workers)
        if placed > self.placed.count:
            self.placed = replace(self.plan, count=placed)
        engine = self._run.job.engine
        surplus = len(self._workers) - wanted_actors(engine, self.plan, placed, busy + left + spare, self._grows)
        for _ in range(-surplus):
            self._start()
        if surplus > 0:
            idle = [worker for worker in self._workers if not worker.load]
            for worker in sorted(idle, key=lambda one: (one.ready, one.node_id is not None))[:surplus]:
                self._stop(worker)

    def _start(self) -> None:
        engine, plan = self._run.job.engine, self.plan
        options: dict[str, Any] = {"num_cpus": plan.cpus, "num_gpus": plan.gpus, "resources": engine.resources}
        labels = dict(engine.labels)
        if self._left_out:
            labels["ray.io/node-id"] = f"!in({','.join(sorted(self._left_out))})"
        if labels:
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
        """Goes on with a worker that has found its node, or has loaded its model."""
        worker = self._starting.pop(reference)
        try:
            result = unpack(ray.get(reference))
        except ray.exceptions.RayTaskError as error:
            self._leave_out(worker, cause_of(error), of_node=True)
        except ray.exceptions.RayError as error:
            self._bury(worker, error)
        else:
            if worker.node_id is None:
                worker.node_id = result
                self._starting[_call(worker.actor, "load")] = worker
            else:
                worker.ready = True

    def _leave_out(self, worker: _Worker, cause: Exception, of_node: bool = False) -> None:
        """Goes on without a node that is not fit for work; raises the cause where that is not the node's, or where no
        other node can do the work.

        of_node: what failed does not depend on the item of work.
        """
        if worker.stopped:
            return
        if not of_node and not isinstance(cause, (DiskError, ray.exceptions.OutOfDiskError)):
            raise cause from None
        others = [node for node in self._nodes if node.node_id != worker.node_id]
        if worker.node_id is None or not any(self.plan.slots(node, self._run.job.engine) for node in others):
            raise cause from None
        logger.warning("node %s is left out; the others do its work: %s", worker.node_id[:12], cause)
        self._left_out.add(worker.node_id)
        for one in [one for one in self._workers if one.node_id == worker.node_id]:
            self._stop(one)
        self._look()

    def _bury(self, worker: _Worker, error: ray.exceptions.RayError, task: _Task | None = None) -> None:
        """Lets another worker take the place of one that died. Raises EngineError where that happens too often: on
        nodes that live, for nodes that go, as spot nodes do, take healthy workers with them."""
        if worker.stopped:
            return
        if task:
            task.deaths.append(worker.node_id)
        if worker in self._workers:
            # It may only be cut off from here, and would then go on working unseen.
            self._stop(worker)
            worker.stopped = False
            self._deaths.append(worker.node_id)
            self._look()
            reason = " ".join(str(error).split())[:400]
            where = "" if self._counted([worker.node_id]) else " with its node"
            logger.warning("a scoring worker died%s and is replaced; its shards are scored again: %s", where, reason)
        patience = time.monotonic() + (0 if is_local(self._run.job) else _NOTICED_WITHIN_S)
        while self._too_many(task):
            if time.monotonic() >= patience:
                most, reason = self._run.job.engine.max_restarts, " ".join(str(error).split())[:400]
                raise EngineError(
                    f"{len(self._counted(self._deaths))} scoring workers died, more than engine.max_restarts ({most}) "
                    f"allows; look at the memory of their nodes and at Ray's logs. The last: {reason}"
                )
            time.sleep(1)
            self._look()

    def _too_many(self, task: _Task | None) -> bool:
        """Whether more workers have died, or died over a task, than engine.max_restarts allows."""
        most = self._run.job.engine.max_restarts
        over_task = self._counted(task.deaths) if task else []
        return len(over_task) > most or len(self._counted(self._deaths)) > most * max(self.plan.count, 1)

    def _counted(self, deaths: Sequence[str | None]) -> list[str | None]:
        """Those of the deaths that are not explained by the loss of a node."""
        if not deaths:
            return []
        alive = {node.node_id for node in self._nodes}
        return [node_id for node_id in deaths if node_id is None or node_id in alive]

    def _wait(self, references: list[Any], soon: bool) -> list[Any]:
        """Those of the references that are done; none after a while, which is shorter where `soon`."""
        self._await_nodes()
        timeout = 0.2 if soon else _LOOK_EVERY_S
        if not references:
            time.sleep(timeout)
            return []
        done, _ = ray.wait(references, num_returns=1, timeout=timeout)
        return list(done)

    def _await_nodes(self) -> None:
        """Says now and then that no actor has a node; raises EngineError where no fitting one has come in time."""
        now, job = time.monotonic(), self._run.job
        if any(worker.node_id is not None for worker in self._workers):
            self._homeless_from = now
            return
        need, has = describe_need(job, self.plan), describe_nodes(self._nodes)
        left = job.engine.wait_for_nodes_s - (now - self._homeless_from)
        if left <= 0 and not self.plan.count:
            raise EngineError(
                f"no node with {need} has come within {job.engine.wait_for_nodes_s:g} s (engine.wait_for_nodes_s); the "
                f"cluster has {has}. Look at its autoscaler, or score on CPU with model.device=cpu"
            )
        # Where a node fits, an actor takes some time to start; where none does, it is worth a word at once.
        soon = not self.plan.count and self._said <= self._homeless_from
        if now - self._said < (_LOOK_EVERY_S if soon else _SAY_EVERY_S):
            return
        self._said = now
        if self.plan.count:
            logger.warning("no scoring actor has started; waiting until a node has %s that nobody uses", need)
        else:
            logger.warning("waiting for a node with %s, for %.0f s more; the cluster has %s", need, left, has)


def _call(actor: Any, method: str, *arguments: Any) -> Any:
    """Starts a call of an actor's method, under whose name Ray's dashboard shows it; what comes of it is a Reply."""
    return actor.call.options(name=f"ScoringActor.{method}").remote(method, *arguments)


def _takes_another(load: int, waiting: int, actors: int) -> bool:
    """Whether a worker with `load` calls takes one of the waiting items. actors: how many there are.

    It takes a second one only while there is an item for every other actor, including those that are still starting. So
    the last items wait for whoever is free first, and not behind a busy model while another one is idle.
    """
    return load == 0 or (load < _CALLS_AT_ONCE and waiting >= actors)
