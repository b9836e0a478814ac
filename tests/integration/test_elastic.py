"""Tests the scoring pool on real Ray whose nodes come late, leave early, or cannot work."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.engine import EngineError, ScoringActor, ScoringPool, list_nodes
from pipeline.scoring import Shard, ShardStats
from pipeline.storage import Run
from schemas.job import parse_job

pytestmark = pytest.mark.timeout(180)
NO_IMAGES = pa.table({"class_name": pa.array([], pa.string())})


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without cores, to which this process is connected."""
    ray.shutdown()  # that of other tests
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


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
            if deed == "hangs" and not (folder / "hung").exists():
                (folder / "hung").write_text(ray.get_runtime_context().get_node_id())
                os.open(folder / "never", os.O_RDONLY)  # until somebody writes
            if deed == "waits":
                (folder / "waiting").touch()
                os.open(folder / "never", os.O_RDONLY)
        return ShardStats(shard.shard_id, 0)


def await_it(happened: Callable[[], Any]) -> None:
    while not happened():
        time.sleep(0.1)


def make_pool(address: str, folder: Path, shards: int, **engine: Any) -> ScoringPool:
    os.mkfifo(folder / "never")
    options = {"address": address, **engine}
    job = parse_job({"dataset": {"images": "x"}, "output": {"uri": str(folder)}, "engine": options})
    return ScoringPool(Run("run", job, "none", ""), "", str(folder), shards, Actor)


def score(pool: ScoringPool, names: Iterable[str]) -> list[str]:
    try:
        return sorted(stats.shard_id for stats in pool.score(Shard(name, NO_IMAGES) for name in names))
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


def work_until(pool: ScoringPool, actors: int) -> Iterator[str]:
    """Shards, until so many actors have found a node."""
    for number in count():
        if pool.placed.count >= actors:
            return
        yield f"works-{number}"


@pytest.mark.slow
def test_nodes_that_come_late_take_part(cluster: Cluster, tmp_path: Path) -> None:
    """The head has no cores: nothing runs before the first node has come; and the shards end when the second has."""
    pool = make_pool(cluster.address, tmp_path, 10_000)
    night = InThread(pool, work_until(pool, 2))
    cluster.add_node(num_cpus=1)
    await_it(lambda: pool.placed.count == 1)
    cluster.add_node(num_cpus=1)
    assert len(night.result()) == len(set(night.found)) > 0 and pool.placed.count == 2


def test_no_node_in_time_is_an_error_that_says_what_is_missing(cluster: Cluster, tmp_path: Path) -> None:
    pool = make_pool(cluster.address, tmp_path, 1, wait_for_nodes_s=1)
    with pytest.raises(EngineError, match=r"no node with 1 CPU core has come within 1 s .* 1 node with 0 CPU cores"):
        score(pool, ["a"])


@pytest.mark.slow
def test_the_loss_of_a_node_does_not_count_as_a_death(cluster: Cluster, tmp_path: Path) -> None:
    doomed = cluster.add_node(num_cpus=1)
    night = InThread(make_pool(cluster.address, tmp_path, 1, max_restarts=0), ["hangs"])
    await_it(lambda: (tmp_path / "hung").exists())
    cluster.add_node(num_cpus=1)
    cluster.remove_node(doomed)
    assert night.result() == ["hangs"]


@pytest.mark.slow
def test_a_node_with_other_weights_is_left_out_while_another_works(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.add_node(num_cpus=1, labels={"weights": "other"})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    said = "is excluded, and others do its work: not the weights"
    names = takewhile(lambda _: said not in caplog.text, (f"works-{number:05}" for number in count()))
    done = score(make_pool(cluster.address, tmp_path, 1000, actors=2), names)
    assert said in caplog.text and done == [f"works-{number:05}" for number in range(len(done))]


@pytest.mark.slow
def test_where_no_node_has_the_weights_that_is_the_error(cluster: Cluster, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=1, labels={"weights": "other"})
    cluster.wait_for_nodes()
    with pytest.raises(EngineError, match="not the weights"):
        score(make_pool(cluster.address, tmp_path, 1), ["a"])


@pytest.mark.slow
def test_a_straggler_is_tried_a_second_time_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    names = ["a", "b", "c", "d", "hangs"]
    assert score(make_pool(cluster.address, tmp_path, 5), names) == names


_DRIVER = """
import sys, ray
from pathlib import Path
from tests.integration import test_elastic
ray.init(address=sys.argv[1], log_to_driver=False)
pool = test_elastic.make_pool(sys.argv[1], Path(sys.argv[2]), 100, actors=5)
test_elastic.score(pool, (f"hangs-{number}" for number in range(100)))
"""


def actors_alive() -> int:
    return sum(actor["State"] != "DEAD" for actor in ray._private.state.actors().values())


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_is_stopped_leaves_no_actor_and_no_demand(
    end: signal.Signals, cluster: Cluster, tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=1)
    driver = subprocess.Popen([sys.executable, "-c", _DRIVER, cluster.address, str(tmp_path)])
    await_it((tmp_path / "hung").exists)
    assert actors_alive() == 5
    driver.send_signal(end)
    driver.wait(60)
    await_it(lambda: actors_alive() == 0)
