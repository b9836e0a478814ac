"""A Ray head with Ray's own autoscaler, whose nodes are processes of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.processes import kill_processes
from tests.seaweed import free_ports

CLIENTS = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""What clients need in their environment: no token, and servers that listen on the loopback address alone."""

_HEAD_ID = "f" * 51 + "00000"
"""The id that the provider of fake nodes gives to the head."""


@contextlib.contextmanager
def run_autoscaling(head: dict[str, float], workers: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Starts a head; yields its address. All is stopped at the end. Clients need the environment of CLIENTS.

    workers: by type of node, `resources` and `max_workers`. They go when they have been idle for 6 seconds.
    """
    (port,) = free_ports(1)
    folder = Path(tempfile.mkdtemp(prefix="alfa-scale-", dir="/tmp"))  # Unix sockets lie below it: it must be short
    config = {
        "cluster_name": "fake",
        "max_workers": sum(kind["max_workers"] for kind in workers.values()),
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
        },
        "available_node_types": {
            "head": {"resources": head, "node_config": {}, "max_workers": 0},
            **{name: {"node_config": {}, **kind} for name, kind in workers.items()},
        },
        "head_node_type": "head",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{f"rsync_{kind}": [] for kind in ("exclude", "filter")},
        **{f"{kind}_commands": [] for kind in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
        "cluster_synced_files": [],
    }
    (folder / "config.json").write_text(json.dumps(config))
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats",
        f"--temp-dir={folder / 'ray'}", "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false",
        f"--num-cpus={int(head.get('CPU', 0))}", f"--autoscaling-config={folder / 'config.json'}",
    ]  # fmt: skip
    faked = {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, env={**os.environ, **CLIENTS, **faked}, stdout=log, stderr=log)
    try:
        _await_head(server, port, folder / "log")
        yield f"127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        server.kill()
        server.wait()
        kill_processes(str(folder))
        shutil.rmtree(folder, ignore_errors=True)


def _await_head(server: subprocess.Popen[bytes], port: int, log: Path, limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and server.poll() is None:
        if "Ray runtime started" in log.read_text(errors="replace"):
            return
        time.sleep(0.2)
    raise RuntimeError(f"the Ray head did not come up: {log.read_text(errors='replace')[-2000:]}")
