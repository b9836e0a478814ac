"""The actors: one obtains prompts; each of the others holds a model and scores shards."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.exceptions
import torch
from ray.util.metrics import Counter, Histogram
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import prompts as prompt_library
from pipeline.alfa import Detector, PromptEmbeddings, load_encoder, locate_weights
from pipeline.engine.cluster import list_nodes
from pipeline.engine.decoders import DecoderPool
from pipeline.engine.errors import EngineError, cause_of, reason_of
from pipeline.engine.head import HeadWatch
from pipeline.engine.plan import ActorPlan
from pipeline.engine.relay import Reply, WarningKeeper, unpack
from pipeline.images import HangGuard, give_back_freed_memory
from pipeline.scoring import (
    Neighbours,
    PreparedClasses,
    Shard,
    ShardStats,
    Thresholds,
    View,
    mask_shard,
    prepare_class,
    score_shard,
)
from pipeline.storage import Run, leases, open_store
from schemas.job import JobConfig
from schemas.prompts import PromptEnsemble, PromptSet

logger = logging.getLogger(__name__)


class PromptActor:
    """Obtains the prompt sets of a job, with one LLM call per class. Between jobs, the library's leases ensure that."""

    def __init__(self, job: JobConfig, owner: str) -> None:
        self._job = job
        self._owner = owner
        self._flights: dict[str, asyncio.Task[PromptSet]] = {}
        self._warnings = WarningKeeper()

    async def ask(self, class_name: str) -> Reply:
        """Calls obtain(). The reply also carries this actor's warnings."""
        return self._warnings.reply(await self.obtain(class_name))

    async def obtain(self, class_name: str) -> PromptSet:
        """Obtains the prompt set of a class. Callers that ask for the same class share one call of the LLM.

        Raises LLMError and PromptLibraryError, as pipeline.prompts.obtain does.
        """
        flight = self._flights.get(class_name)
        if flight is None or (flight.done() and flight.exception() is not None):
            flight = asyncio.create_task(asyncio.to_thread(self._obtain, class_name))
            self._flights[class_name] = flight
        return await asyncio.shield(flight)

    def _obtain(self, class_name: str) -> PromptSet:
        output = open_store(self._job.output.uri, self._job.storage)
        lease_s = self._job.engine.lease_s
        return prompt_library.obtain(output, class_name, self._job.prompts, owner=self._owner, lease_s=lease_s)


def obtain_prompts(job: JobConfig, classes: Sequence[str], owner: str) -> list[PromptSet]:
    """Obtains the prompt sets of the classes, in their order, through a prompt actor.

    An actor that dies is replaced; the new one finds in the library what is stored there already. Raises LLMError and
    PromptLibraryError as pipeline.prompts.obtain does, EngineError after more deaths than engine.max_restarts, or if
    the head of the cluster is lost.
    """
    deaths, head = 0, HeadWatch()
    while True:
        head.ask()
        # Where the driver works, an actor probably can, too; another node may have a full disk, or be taken away. Not
        # soft, because Ray would then prefer a node with cores to a head without.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": "DEFAULT" if deaths else here}
        # Ray could restart the actor, but would then print a retry of each running call when the actor is stopped.
        actor: Any = ray.remote(PromptActor).options(**options).remote(job, owner)
        try:
            return [unpack(reply) for reply in head.get([actor.ask.remote(class_name) for class_name in classes])]
        except ray.exceptions.RayTaskError as error:
            raise cause_of(error) from None
        except ray.exceptions.RayActorError as error:
            deaths += 1
            reason = reason_of(error)
            if deaths > job.engine.max_restarts:
                raise EngineError(
                    f"the prompt actor died {deaths} times, more than engine.max_restarts ({job.engine.max_restarts}) "
                    f"allows; the last time: {reason}"
                ) from None
            logger.warning("the prompt actor died and is started again: %s", reason)
        finally:
            ray.kill(actor)


@dataclass(frozen=True, eq=False)
class ClassSetup:
    """What actors need to know about a class. It is stored in Ray's object store."""

    embeddings: PromptEmbeddings
    neighbours: Neighbours


class ScoringActor:
    """Holds a model on a GPU or on CPU cores. Shards take turns in using it, and threads do the I/O."""

    def __init__(self, job: JobConfig, weights_sha256: str, source_uri: str, cpus: int) -> None:
        self._job = job
        self._weights_sha256 = weights_sha256
        self._threads = max(4, 2 * cpus)
        self._cpus = cpus
        self._source_uri = source_uri
        self._source = open_store(source_uri, job.storage)
        self._output = open_store(job.output.uri, job.storage)
        self._setups: dict[str, ray.ObjectRef[ClassSetup]] = {}
        self._owner = leases.new_owner()
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._isolate = False
        self._decoders: DecoderPool | None = None
        self._guard = HangGuard()
        self._warnings = WarningKeeper()
        # Ray's Prometheus endpoint on each node serves these as ray_alfa_...
        self._images = Counter("alfa_images", "Images done, by outcome: ok, or the type of error.", ("outcome",))
        self._seconds = Histogram("alfa_shard_seconds", "Time for a shard.", [1, 3, 10, 30, 100, 300, 1000])

    def call(self, method: str, *arguments: Any) -> Reply:
        """Calls a method of this actor. The reply also carries this actor's warnings."""
        return self._warnings.reply(getattr(self, method)(*arguments))

    def settle(self, plan: ActorPlan) -> str:
        """Sets the number of threads to this actor's share of its node's cores. Returns the id of the node."""
        node_id: str = ray.get_runtime_context().get_node_id()
        for node in list_nodes():
            if node.node_id == node_id:
                self._cpus = plan.cores(node, self._job.engine)
                self._threads = max(4, 2 * self._cpus)
        return node_id

    def load(self) -> None:
        """Loads the model. Call it before the methods below. Raises EngineError and ModelError.

        It is not part of __init__, because Ray reports an exception there as the death of the actor.
        """
        weights = locate_weights(self._job.model)
        if weights.sha256 != self._weights_sha256:
            raise EngineError(
                f"{weights.path} on node {socket.gethostname()} is not the file that the run was planned with (SHA-256 "
                f"{weights.sha256[:12]}, planned {self._weights_sha256[:12]}); put the same weights on all nodes"
            )
        torch.set_num_threads(self._cpus)
        give_back_freed_memory()
        encoder = load_encoder(self._job.model, weights)
        self._detector = Detector(encoder, self._job.resolved_method, self._job.references, self._job.peers)
        self._classes: PreparedClasses | None = None

    def embed(self, ensemble: PromptEnsemble) -> PromptEmbeddings:
        """Embeds the prompts of a class. One actor does so for all actors of a run."""
        with self._turn:
            return self._detector.embed(ensemble)

    def score(
        self, shard: Shard, run: Run, setups: Mapping[str, ray.ObjectRef[ClassSetup]], isolate: bool
    ) -> ShardStats:
        """Scores a shard (see pipeline.scoring.score_shard), and counts its images in Ray's metrics.

        setups: references to the setups in Ray's object store, by class. A setup is fetched, and the memory of its
        class made or read, before the first image of the class is scored. isolate: decode in another process; from then
        on, also references and peers.
        """
        self._setups.update(setups)
        self._isolate = self._isolate or isolate
        if self._classes is None:
            self._classes = PreparedClasses(partial(self._prepare, run))
        decoders = None if isolate or self._job.engine.decode == "actor" else self._share_decoding(run)
        started = time.monotonic()
        stats = score_shard(
            shard,
            run,
            self._detector,
            self._classes,
            self._source,
            self._output,
            self._threads,
            turn=self._turn,
            guard=self._guard,
            isolate=isolate,
            decoders=decoders,
        )
        self._seconds.observe(time.monotonic() - started)
        for outcome, count in {**stats.errors, "ok": stats.images - sum(stats.errors.values())}.items():
            if count:
                self._images.inc(count, {"outcome": outcome})
        return stats

    def _share_decoding(self, run: Run) -> DecoderPool:
        with self._lock:
            if self._decoders is None:
                view = View.of(self._detector)
                self._decoders = DecoderPool(run, view, self._source_uri, self._cpus, self._threads)
            return self._decoders

    def _prepare(self, run: Run, class_name: str) -> PromptEmbeddings:
        setup: ClassSetup = ray.get(self._setups[class_name])
        return prepare_class(
            run,
            setup.embeddings,
            setup.neighbours,
            self._detector,
            self._source,
            self._output,
            self._owner,
            guard=self._guard,
            isolate=self._isolate,
        )

    def mask(self, shard_id: str, digest: str, thresholds: Mapping[str, Thresholds], run: Run) -> ShardStats:
        """Makes the masks of a scored shard; see pipeline.scoring.mask_shard. Nothing is decoded any more."""
        if self._decoders is not None:
            self._decoders.close()
        return mask_shard(shard_id, digest, thresholds, run, self._output, self._threads)
