"""Tests the scoring pool on real Ray whose nodes come late, leave early, or cannot work."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.engine import EngineError
from tests.clusters import run_cluster
from tests.pools import InThread, actors_alive, await_it, empty_shard, make_pool, score, work_until

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without cores, to which this process is connected."""
    with run_cluster() as started:
        ray.init(address=started.address, log_to_driver=False, logging_level=logging.ERROR)
        yield started


@pytest.fixture
def two_nodes(cluster: Cluster) -> Cluster:
    """The cluster with two nodes of a core each."""
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    return cluster


@pytest.mark.slow
def test_nodes_that_come_late_take_part(cluster: Cluster, tmp_path: Path) -> None:
    """The head has no cores: nothing runs before the first node has come; and the shards end when the second has."""
    pool = make_pool(cluster.address, tmp_path, 10_000)
    night = InThread(pool, work_until(lambda: pool.placed.count >= 2))
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
def test_a_straggler_is_tried_a_second_time_elsewhere(two_nodes: Cluster, tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "hangs"]
    assert score(make_pool(two_nodes.address, tmp_path, 5), names) == names


@pytest.mark.slow
def test_the_actor_of_a_needless_try_keeps_its_model_for_the_masks(two_nodes: Cluster, tmp_path: Path) -> None:
    """The try ends with an error when its shard is scored already, which nobody needs to know."""
    names = ["a", "b", "c", "d", "fails"]
    pool = make_pool(two_nodes.address, tmp_path, 5, policy="quantile")
    assert sorted(stats.shard_id for stats in pool.score(map(empty_shard, names))) == names
    with (tmp_path / "never").open("wb"):
        await_it((tmp_path / "failed").exists)
    assert sorted(stats.shard_id for stats in pool.mask(names, "digest", {})) == names
    pool.close()
    assert len(ray._private.state.actors()) == 2, "an actor had to be replaced"


_DRIVER = """
import sys, ray
from pathlib import Path
from tests.pools import make_pool, score
ray.init(address=sys.argv[1], log_to_driver=False)
pool = make_pool(sys.argv[1], Path(sys.argv[2]), 100, actors=5)
score(pool, (f"hangs-{number}" for number in range(100)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_is_stopped_leaves_no_actor_and_no_demand(
    end: signal.Signals, cluster: Cluster, tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=1)
    driver = subprocess.Popen([sys.executable, "-c", _DRIVER, cluster.address, str(tmp_path)])
    await_it((tmp_path / "hung").exists)
    assert len(actors_alive()) == 5
    driver.send_signal(end)
    driver.wait(60)
    await_it(lambda: not actors_alive())
