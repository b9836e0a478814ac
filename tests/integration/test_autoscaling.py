"""A night on Ray's own autoscaler: from no GPU node to several, and back before the night ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from pipeline.engine import ScoringActor, ScoringPool, connect, list_nodes
from pipeline.scoring import Shard, ShardStats
from pipeline.storage import Run
from schemas.job import parse_job
from tests.autoscaling import CLIENTS, run_autoscaling


class Actor(ScoringActor):
    """Has no model; says with each shard on which node it was."""

    def load(self) -> None:
        pass

    def score(self, shard: Shard, run: Run, *_: Any, **__: Any) -> ShardStats:
        while shard.shard_id == "last" and gpu_nodes() > 2:
            time.sleep(0.5)
        time.sleep(0.2)
        return ShardStats(f"{shard.shard_id} {ray.get_runtime_context().get_node_id()}", 0)


def gpu_nodes() -> int:
    return sum(node.amount("GPU") > 0 for node in list_nodes())


def drive(address: str, folder: str) -> None:
    """Scores shards until three actors have found a node, and one more that waits until one of the nodes is gone."""
    job = parse_job({"dataset": {"images": "x"}, "output": {"uri": folder}, "engine": {"address": address}})
    images = pa.table({"class_name": pa.array([], pa.string())})
    with connect(job):
        pool = ScoringPool(Run("run", job, "none", ""), "", folder, 100_000, Actor)
        many = (f"shard-{number}" for number in range(100_000) if pool.placed.count < 3)
        found = [stats.shard_id for stats in pool.score(Shard(name, images) for name in chain(many, ["last"]))]
        pool.close()
    print(json.dumps([name.split() for name in found]))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_night_grows_from_nothing_and_lets_nodes_go_before_it_ends(tmp_path: Path) -> None:
    """The head has cores on which the night could run; with device auto and an autoscaler, it waits for GPUs."""
    workers = {"gpu": {"resources": {"CPU": 2, "GPU": 1}, "max_workers": 3}}
    with run_autoscaling({"CPU": 2}, workers) as address:
        command = f"from tests.integration.test_autoscaling import drive; drive({address!r}, {str(tmp_path)!r})"
        environment = {**os.environ, **CLIENTS}
        done = subprocess.run(
            [sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=350
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "last" in {shard for shard, _ in found}
    nodes = {node for _, node in found}
    assert len(nodes) >= 2 and not any(node.endswith("00000") for node in nodes)  # the head's id ends so
