"""Tests the scoring pool with Ray's autoscaler, which starts nodes when actors wait for them and removes idle ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipeline.engine import ScoringPool
from tests.autoscaling import kill_node, run_autoscaler, worker_nodes
from tests.pools import InThread, await_it, make_pool, work_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
MOST = 4


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    with run_autoscaler(MOST, {"CPU": 1, "GPU": 1}) as address:
        yield address


@pytest.fixture
def address(head: str) -> Iterator[str]:
    """A cluster without a node but its head, to which this process is connected."""
    ray.shutdown()  # that of other tests
    ray.init(address=head, log_to_driver=False, logging_level=logging.ERROR)
    await_it(lambda: not worker_nodes())
    yield head
    ray.shutdown()


class Watched(InThread):
    """A night, and the largest number of nodes that there were at once."""

    def __init__(self, pool: ScoringPool, names: Iterator[str]) -> None:
        self.most_nodes = 0
        super().__init__(pool, names)

    def result(self) -> list[str]:
        while self.is_alive():
            self.most_nodes = max(self.most_nodes, len(worker_nodes()))
            self.join(0.2)
        return self.found


def test_a_night_grows_from_zero_to_all_gpus_and_its_nodes_go_afterwards(address: str, tmp_path: Path) -> None:
    pool = make_pool(address, tmp_path, 10_000)
    assert not worker_nodes()
    night = Watched(pool, work_until(lambda: pool.placed.count == MOST))
    assert len(night.result()) == len(set(night.found)) > 0
    assert night.most_nodes == MOST and pool.plan.gpus == 1
    await_it(lambda: not worker_nodes())


def test_few_shards_start_as_few_nodes(address: str, tmp_path: Path) -> None:
    night = Watched(make_pool(address, tmp_path, 2), iter(["a", "b"]))
    assert night.result() == ["a", "b"] and night.most_nodes <= 2


def test_nodes_without_work_go_while_the_last_shard_is_scored(address: str, tmp_path: Path) -> None:
    """The last shard, and its second try elsewhere, wait until the other nodes are gone."""
    pool = make_pool(address, tmp_path, 10_000)

    def names() -> Iterator[str]:
        yield "waits"
        yield from work_until(lambda: pool.placed.count == MOST)

    night = Watched(pool, names())
    await_it((tmp_path / "waiting").exists)
    await_it(lambda: pool.placed.count == MOST and len(worker_nodes()) <= 2)
    assert night.is_alive()
    with (tmp_path / "never").open("wb"):
        pass
    assert "waits" in night.result()


def test_three_of_four_nodes_are_lost_and_others_come(address: str, tmp_path: Path) -> None:
    """No death counts, and each shard is told of once."""
    pool = make_pool(address, tmp_path, 10_000, max_restarts=0)
    come_back = False
    night = Watched(pool, work_until(lambda: come_back))
    await_it(lambda: pool.placed.count == MOST)
    first = worker_nodes()
    for node in first[:3]:
        kill_node(node)
    await_it(lambda: len(set(worker_nodes()) - set(first)) == 3)
    come_back = True
    assert len(night.result()) == len(set(night.found)) > 0
    assert night.found == sorted(f"works-{number}" for number in range(len(night.found)))
