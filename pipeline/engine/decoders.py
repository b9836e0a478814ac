"""Decoders: actors on nodes without a GPU, which read and decode photos for a scoring actor.

A scoring actor owns its decoders. So they end with it, also those that have no node yet: these make an autoscaler add
nodes. A decoder gets photos only when it has started, so a node that never comes makes nobody wait.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import ray
import ray.exceptions
import torch

from pipeline.engine.cluster import list_nodes
from pipeline.engine.errors import reason_of
from pipeline.engine.growth import Growth
from pipeline.engine.plan import away_from
from pipeline.engine.relay import Reply, WarningKeeper, unpack
from pipeline.images import Decoded, ImageError, give_back_freed_memory
from pipeline.scoring import PhotoReader, Row, View
from pipeline.storage import Run, open_store

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 3.0
"""Seconds between two looks at how long the model waits."""

_ANSWER_WITHIN_S = 60.0
"""Seconds after which a decoder that does not answer is given up."""

_PAUSE_S = 30.0
"""Seconds without new decoders after one has failed."""

_TRIES = 2
"""Decoders that are given the same photos, if they fail. A photo may be what kills them."""


class Decoder:
    """Reads and decodes photos on one core."""

    def __init__(self, run: Run, view: View, source_uri: str) -> None:
        self._arguments = run, view, source_uri
        self._warnings = WarningKeeper()

    def settle(self) -> str:
        """Opens the stores. Call it before decode. Returns the id of the node. Raises StoreError."""
        run, view, source_uri = self._arguments
        torch.set_num_threads(1)
        give_back_freed_memory()
        source, output = open_store(source_uri, run.job.storage), open_store(run.job.output.uri, run.job.storage)
        self._reader = PhotoReader(run, view, source, output)
        node_id: str = ray.get_runtime_context().get_node_id()
        return node_id

    def decode(self, images: Sequence[Row]) -> Reply:
        """Returns for each row its decoded photo, or None where it has no usable pixels. Raises StoreError.

        The reply also carries this actor's warnings.
        """
        found = [self._reader.read(image) for image in images]
        return self._warnings.reply([item if isinstance(item, Decoded) else None for item in found])


class DecoderPool:
    """The decoders of a scoring actor; see pipeline.scoring.Decoders. Safe for use by several threads.

    Photos are shared between them and the actor's own threads: whoever is free takes the next. Photos that they cannot
    decode are left to the actor, so that what happens to one does not depend on where it was decoded.
    """

    def __init__(
        self,
        run: Run,
        view: View,
        source_uri: str,
        cores: int,
        threads: int,
        decoder_class: type[Decoder] = Decoder,
    ) -> None:
        """cores, threads: with which the actor itself decodes."""
        self._order = threading.Lock()
        self._arguments = run, view, source_uri
        self._cores = cores
        self._threads = threads
        self._class = decoder_class
        self._free: SimpleQueue[Any] = SimpleQueue()  # decoders, and None for each thread of the actor itself
        for _ in range(threads):
            self._free.put(None)
        self._lock = threading.RLock()
        self._starting: dict[Any, Any] = {}
        self._working: set[Any] = set()
        self._looked = self._quiet_until = now = time.monotonic()
        self._growth = Growth(now)
        self._warned: set[str] = set()

    @property
    def order(self) -> contextlib.AbstractContextManager[Any]:
        """A lock; see pipeline.scoring.Decoders."""
        return self._order

    @property
    def places(self) -> int:
        """The number of the actor's threads and of decoders that work."""
        return self._threads + len(self._working)

    def decode(
        self, images: Sequence[Row], here: Callable[[Row], Decoded | ImageError]
    ) -> Sequence[Decoded | ImageError]:
        """Returns the decoded photos of some rows, in their order."""
        for _ in range(_TRIES):
            decoder = self._free.get()
            if decoder is None:
                try:
                    return [here(image) for image in images]
                finally:
                    self._free.put(None)
            found = self._ask(decoder, images)
            if found is not None:
                return [here(image) if item is None else item for image, item in zip(images, found, strict=True)]
        return [here(image) for image in images]

    def _ask(self, decoder: Any, images: Sequence[Row]) -> Sequence[Decoded | None] | None:
        """Returns the answer of a decoder, which is then free again; None if it failed, and is given up."""
        try:
            found: Sequence[Decoded | None] = unpack(ray.get(decoder.decode.remote(images), timeout=_ANSWER_WITHIN_S))
        except ray.exceptions.RayError as error:
            self._give_up(decoder, error)
            return None
        self._free.put(decoder)
        return found

    def note(self, seconds: float, images: int) -> None:
        """Takes note of how long the model has waited for a batch. Every few seconds, adds decoders if it waits."""
        with self._lock:
            self._growth.note(seconds, images)
            now = time.monotonic()
            if now - self._looked < _LOOK_EVERY_S:
                return
            self._looked = now
            self.admit()
            more = self._growth.more(now, self._cores, len(self._working))
            if not self._starting and now >= self._quiet_until:
                self.add(more)

    def add(self, count: int) -> None:
        """Asks Ray for so many more decoders."""
        if not count:
            return
        options: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0}
        if labels := away_from(_nodes_with_gpu()):
            options["label_selector"] = labels
        remote: Any = ray.remote(self._class).options(**options)
        with self._lock:
            for _ in range(count):
                decoder = remote.remote(*self._arguments)
                self._starting[decoder.settle.remote()] = decoder

    def admit(self, timeout_s: float = 0.0) -> None:
        """Gives work to the decoders that have started. timeout_s: how long to wait until all have."""
        with self._lock:
            if not self._starting:
                return
            started, _ = ray.wait(list(self._starting), num_returns=len(self._starting), timeout=timeout_s)
            with_gpu = _nodes_with_gpu() if started else set()
            for reference in started:
                decoder = self._starting.pop(reference)
                try:
                    node_id = ray.get(reference)
                except ray.exceptions.RayError as error:
                    self._give_up(decoder, error)
                    continue
                if node_id in with_gpu:  # it has joined since; its cores are for its scoring actors
                    ray.kill(decoder)
                    continue
                self._working.add(decoder)
                self._free.put(decoder)

    def _give_up(self, decoder: Any, error: ray.exceptions.RayError) -> None:
        """Stops a decoder that has failed, and adds none for a while."""
        with self._lock:
            self._working.discard(decoder)
            self._quiet_until = time.monotonic() + _PAUSE_S
            kind = type(error).__name__
            known = kind in self._warned
            self._warned.add(kind)
        ray.kill(decoder)
        if not known:
            logger.warning(
                "a decoder failed, and others decode its photos; more failures of this kind are not logged: %s",
                reason_of(error) or kind,
            )

    def close(self) -> None:
        """Stops the decoders, also those that have no node yet. Call it when nothing is being decoded."""
        with self._lock:
            for decoder in [*self._working, *self._starting.values()]:
                ray.kill(decoder)
            self._starting, self._working = {}, set()


def _nodes_with_gpu() -> set[str]:
    return {node.node_id for node in list_nodes() if node.amount("GPU")}
