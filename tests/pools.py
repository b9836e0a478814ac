"""A pool of actors without a model, for tests: what an actor does with a shard, the shard's name says."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from pipeline.engine import EngineError, ScoringActor, ScoringPool, list_nodes
from pipeline.scoring import Shard, ShardStats
from pipeline.storage import Run, StoreError
from schemas.job import parse_job

_NO_IMAGES = pa.table({"class_name": pa.array([], pa.string())})


class Actor(ScoringActor):
    """Has no model; does with a shard what its name says."""

    def load(self) -> None:
        (mine,) = (node for node in list_nodes() if node.node_id == ray.get_runtime_context().get_node_id())
        if mine.labels.get("weights") == "other":
            raise EngineError("not the weights that the run was planned with")

    def score(self, shard: Shard, run: Run, *_: Any, **__: Any) -> ShardStats:
        folder, (deed, _, _) = Path(self._job.output.uri), shard.shard_id.partition("-")
        with self._turn:
            if deed == "works":
                time.sleep(0.05)
            if deed == "warns":
                logging.getLogger("pipeline").warning("on node %s", ray.get_runtime_context().get_node_id())
            if deed == "hangs" and not (folder / "hung").exists():
                (folder / "hung").write_text(ray.get_runtime_context().get_node_id())
                os.open(folder / "never", os.O_RDONLY)  # until somebody writes
            if deed == "fails" and not (folder / "first").exists():
                (folder / "first").touch()
                os.open(folder / "never", os.O_RDONLY)
                (folder / "failed").touch()
                raise StoreError("the store cannot be used")
            if deed == "waits":
                (folder / "waiting").touch()
                os.open(folder / "never", os.O_RDONLY)
        return ShardStats(shard.shard_id, 0)

    def mask(self, shard_id: str, *_: Any) -> ShardStats:
        return ShardStats(shard_id, 0)


def await_it(happened: Callable[[], Any]) -> None:
    while not happened():
        time.sleep(0.1)


def actors_alive() -> list[str]:
    """The classes of all actors of the cluster that run or wait for a node."""
    actors = ray._private.state.actors().values()
    return [str(actor["ActorClassName"]) for actor in actors if actor["State"] != "DEAD"]


def work_until(happened: Callable[[], bool]) -> Iterator[str]:
    """Yields names of shards until something has happened."""
    for number in count():
        if happened():
            return
        yield f"works-{number}"


def make_pool(
    address: str,
    folder: Path,
    shards: int,
    actor_class: type[ScoringActor] = Actor,
    policy: str = "fixed",
    **engine: Any,
) -> ScoringPool:
    os.mkfifo(folder / "never")
    options = {"address": address, **engine}
    places = {"dataset": {"images": "x"}, "output": {"uri": str(folder)}}
    job = parse_job({**places, "threshold": {"policy": policy}, "engine": options})
    return ScoringPool(Run("run", job, "none", ""), "", str(folder), shards, actor_class)


def empty_shard(name: str) -> Shard:
    return Shard(name, _NO_IMAGES)


def score(pool: ScoringPool, names: Iterable[str]) -> list[str]:
    try:
        return sorted(stats.shard_id for stats in pool.score(map(empty_shard, names)))
    finally:
        pool.close()


class InThread(threading.Thread):
    """Scores in a thread of its own."""

    def __init__(self, pool: ScoringPool, names: Iterable[str]) -> None:
        super().__init__(daemon=True)
        self.pool, self.names, self.found = pool, names, list[str]()
        self.start()

    def run(self) -> None:
        self.found = score(self.pool, self.names)

    def result(self) -> list[str]:
        self.join(120)
        return self.found
