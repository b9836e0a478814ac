"""The scoring pool: a bounded loop that feeds actors with shards, and replaces actors that die."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import ray
import ray.exceptions

from pipeline.alfa import PromptEmbeddings
from pipeline.engine.actors import ScoringActor
from pipeline.engine.cluster import node_resources, plan_actors
from pipeline.engine.errors import EngineError, cause_of
from pipeline.engine.relay import unpack
from pipeline.scoring import Shard, ShardStats, Thresholds
from pipeline.storage import Run
from schemas.prompts import PromptEnsemble

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")

_CALLS_AT_ONCE = 2
"""Calls that an actor works on at the same time: while one shard uses the model, another reads its images or writes its
last masks."""

_PATIENCE_S = 60.0
"""After this time without an event, the driver checks whether any actor has started at all."""


@dataclass(eq=False)
class _Worker:
    """A scoring actor, as the driver knows it. load: how many of its calls are under way."""

    actor: Any
    load: int = 0


class ScoringPool:
    """The scoring actors of a run, and the bounded loop that feeds them.

    An actor that dies is replaced, and another one scores its shards again. Where its node is gone too, the new actor
    may find no place; then the others do its work.
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
        """Stops the actors. Shards that are not finished are left to the next job that works on the run."""
        for worker in [*self._workers, *self._starting.values()]:
            ray.kill(worker.actor)

    def embed(self, ensembles: Sequence[PromptEnsemble], references: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Encodes the prompts and reference images of all classes, once, and puts the embeddings where every actor can
        fetch them (Ray's object store). To be called before score().

        references: manifest rows of the reference images, by class.
        """

        def submit(actor: Any, ensemble: PromptEnsemble, _: int) -> Any:
            return _call(actor, "embed", ensemble, references.get(ensemble.class_name, ()), self._run.run_id)

        for embeddings in self._each(iter(ensembles), submit):
            name, memory = embeddings.ensemble.class_name, embeddings.memory
            shots, wanted = 0 if memory is None else memory.shots, len(references.get(name, ()))
            if shots < wanted:
                logger.warning("only %d of the %d reference images of %s can be read", shots, wanted, name)
            self._prompts[name] = ray.put(embeddings)

    def score(self, shards: Iterator[Shard]) -> Iterator[ShardStats]:
        """Scores shards, and yields their stats in the order in which they finish.

        A shard over which a worker died is decoded image by image, each in a process of its own.
        """

        def submit(actor: Any, shard: Shard, deaths: int) -> Any:
            classes = shard.images.column("class_name").unique().to_pylist()
            prompts = {name: self._prompts[name] for name in classes}
            return _call(actor, "score", shard, self._run, prompts, deaths > 0)

        return self._each(shards, submit)

    def mask(self, shard_ids: Iterator[str], digest: str, thresholds: Mapping[str, Thresholds]) -> Iterator[ShardStats]:
        """Makes the masks of shards that are scored, once their thresholds are known; yields stats as they finish."""
        shared = ray.put(thresholds)

        def submit(actor: Any, shard_id: str, _: int) -> Any:
            return _call(actor, "mask", shard_id, digest, shared, self._run)

        return self._each(shard_ids, submit)

    def _each(self, items: Iterator[_Item], submit: Callable[[Any, _Item, int], Any]) -> Iterator[Any]:
        """Yields the results of submit(actor, item, deaths) for all items, as they come.

        deaths: how many workers have died over the item. _takes_another decides which worker gets the next one.
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
                    result = unpack(ray.get(reference))
                except ray.exceptions.RayTaskError as error:
                    raise cause_of(error) from None
                except ray.exceptions.RayError as error:
                    self._replace(worker, error, deaths + 1)
                    waiting.appendleft((item, deaths + 1))
                else:
                    self._deaths = 0
                    yield result

    def _find_worker(self, waiting: int) -> _Worker | None:
        """Finds the worker that takes one of the waiting items; None where all of them have to go on waiting."""
        worker = min(self._workers, key=lambda one: one.load, default=None)
        return worker if worker is not None and _takes_another(worker.load, waiting, self.plan.count) else None

    def _start(self) -> None:
        options = {"num_cpus": self.plan.cpus, "num_gpus": self.plan.gpus, "max_restarts": 0}
        remote = ray.remote(self._actor_class).options(**options, max_concurrency=_CALLS_AT_ONCE)
        worker = _Worker(remote.remote(*self._arguments))
        self._starting[_call(worker.actor, "load")] = worker

    def _receive(self, loaded: Any) -> None:
        """Moves a worker that has loaded its model from those that start to those that work."""
        worker = self._starting.pop(loaded)
        self._workers.append(worker)
        try:
            unpack(ray.get(loaded))
        except ray.exceptions.RayTaskError as error:
            raise cause_of(error) from None
        except ray.exceptions.RayError as error:
            self._replace(worker, error, 1)

    def _replace(self, worker: _Worker, error: ray.exceptions.RayError, deaths: int) -> None:
        """Starts another worker for one that died. Raises EngineError where that happens too often."""
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        self._deaths += 1
        # It may only be cut off from here, and would then go on working unseen.
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


def _call(actor: Any, method: str, *arguments: Any) -> Any:
    """Starts a call of an actor's method, under whose name Ray's dashboard shows it; what comes of it is a Reply."""
    return actor.call.options(name=f"ScoringActor.{method}").remote(method, *arguments)


def _takes_another(load: int, waiting: int, actors: int) -> bool:
    """Whether a worker with `load` calls takes one of the waiting items. actors: how many are planned.

    It takes a second one only while there is an item for every other actor, including those that are still starting. So
    the last items wait for whoever is free first, and not behind a busy model while another one is idle.
    """
    return load == 0 or (load < _CALLS_AT_ONCE and waiting >= actors)
