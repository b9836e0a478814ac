"""Ray clusters of several nodes on this machine, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import ray
from ray.cluster_utils import Cluster


@contextlib.contextmanager
def run_cluster(*cores: int) -> Iterator[Cluster]:
    """Starts a head without cores, and a node for each number, with so many cores.

    A Ray that other tests have left in this process is ended first, because the cluster's end would break it.
    """
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for count in cores:
        cluster.add_node(num_cpus=count)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()
