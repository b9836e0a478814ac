"""A Ray cluster that starts from zero: a head without cores, and Ray's autoscaler, which adds and removes nodes.

Ray's own fake provider starts a node as processes on this machine, with GPUs that do not exist. Everything else is the
autoscaler (version 2) of real clusters. ray.cluster_utils.AutoscalingCluster would do the same, but it stops every Ray
on the machine, and needs a file that Ray's wheels lack.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.ray_head import auth_mode, await_start, start_ray
from tests.seaweed import free_ports

IDLE_S = 6
"""Seconds after which the autoscaler removes an idle node."""


@contextlib.contextmanager
def run_autoscaler(nodes: int, resources: dict[str, float]) -> Iterator[str]:
    """Starts a head and its autoscaler, and yields the address to join. At the end, all processes are stopped.

    nodes: the largest number of nodes besides the head. resources: of each.
    """
    port, agent = free_ports(2)
    folder = Path(tempfile.mkdtemp(prefix="alfa-grow-", dir="/tmp"))  # Unix sockets lie below it: it must be short
    address = f"{ray.util.get_node_ip_address()}:{port}"  # type: ignore[no-untyped-call]
    file = folder / "cluster.json"
    file.write_text(json.dumps(_cluster(address, nodes, resources)))
    options = [
        "--head", f"--autoscaling-config={file}", "--num-cpus=0", f"--port={port}", "--include-dashboard=false",
        f"--dashboard-agent-listen-port={agent}",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": auth_mode(),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    with start_ray(folder, options, environment) as (head, log):
        await_start(head, log)
        yield address


def _cluster(address: str, nodes: int, resources: dict[str, float]) -> dict[str, object]:
    """A cluster file as for `ray up`. The keys without a value are demanded by its schema."""
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "gcs_address": address,
        "head_node_id": FAKE_HEAD_NODE_ID,
    }
    commands = ("setup", "initialization", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "fake",
        "max_workers": nodes,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": provider,
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": nodes},
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        **{f"{name}_commands": [] for name in commands},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


def worker_nodes() -> list[str]:
    """Ids of the nodes that are alive, without the head."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["NodeID"] for node in nodes if node["Alive"] and node["NodeID"] != FAKE_HEAD_NODE_ID]


def kill_node(node_id: str) -> None:
    """Takes a node away as a spot market does: all of its processes at once, without a word."""
    mark = f"RAY_CLOUD_INSTANCE_ID={node_id}".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if mark in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)
