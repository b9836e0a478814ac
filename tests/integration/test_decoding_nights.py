"""Nights whose photos are decoded on nodes without a GPU, on clusters of several nodes."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from ray.cluster_utils import Cluster

from pipeline.engine import DecoderPool
from pipeline.scoring import View
from pipeline.storage import Store
from tests.autoscaling import run_autoscaler, worker_nodes
from tests.clusters import run_cluster
from tests.command import COMMAND
from tests.nights import NIGHT, run_of
from tests.pools import actors_alive, await_it
from tests.processes import find_processes, kill_processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(290)]

VIEW = View((98, 98), "bicubic", (7, 7))
COPIES = 80


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A core for the actor, and three for decoders."""
    with run_cluster(4) as started:
        yield started


@pytest.fixture
def full_cluster() -> Iterator[Cluster]:
    """A core for the actor, and none for decoders."""
    with run_cluster(1) as started:
        yield started


def write_slow_photos(folder: Path) -> None:
    """Four PNG files of 3 megapixels by many names, each of which takes tens of milliseconds, and a broken one."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(4):
        texture = Image.fromarray(random.integers(0, 255, (60, 40, 3), dtype=np.uint8)).resize((2000, 1500))
        texture.save(folder / f"{number}-000.png", compress_level=1)
        for copy in range(1, COPIES):
            os.link(folder / f"{number}-000.png", folder / f"{number}-{copy:03}.png")
    (folder / "2-broken.png").write_bytes(b"broken")


def start(cluster: Cluster, images: Path, output: Path) -> subprocess.Popen[str]:
    options = (
        "engine.decode=cluster", "engine.actors=1", "engine.cpus_per_actor=1", "engine.shard_size=128",
        "model.batch_size=8", "model.image_size=56", "peers=none", "engine.max_error_rate=1",
    )  # fmt: skip
    sets = [part for option in options for part in ("--set", option)]
    night = ["score", "--images", str(images), "--output", str(output), "--run-date", NIGHT, *sets]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    return subprocess.Popen([*COMMAND, *night], env=environment, stderr=subprocess.PIPE, text=True)


def published(output: Path) -> list[dict[str, Any]]:
    files = sorted(output.glob("scores/**/*.parquet"))
    table = pa.concat_tables([pq.read_table(path, partitioning=None) for path in files])
    rows: list[dict[str, Any]] = table.drop_columns(["scored_at", "mask_uri"]).to_pylist()
    return sorted(rows, key=lambda row: str(row["image_uri"]))


def test_a_night_whose_decoders_are_killed_has_every_row_once(cluster: Cluster, tmp_path: Path) -> None:
    """Some copies of a photo are decoded by the actor, some by decoders; their rows are the same."""
    write_slow_photos(tmp_path / "in" / "nut")
    night = start(cluster, tmp_path / "in", tmp_path / "out")
    while not list(find_processes(r"ray::Decoder\.decode")):
        assert night.poll() is None, "the night ended before a decoder had worked"
        time.sleep(0.1)
    assert kill_processes(r"ray::Decoder") >= 1
    _, error = night.communicate()
    assert night.returncode == 0 and "a decoder failed" in error, error
    rows = published(tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "in" / "nut").iterdir())
    assert [Path(row["image_uri"]).name for row in rows] == names
    assert [row["status"] for row in rows].count("error") == 1
    scores: dict[str, list[float]] = {}
    for name, row in zip(names, rows, strict=True):
        if row["status"] == "ok":
            scores.setdefault(name[0], []).append(row["score"])
    assert [len(found) for found in scores.values()] == [COPIES] * 4
    assert all(found == pytest.approx([found[0]] * COPIES, abs=1e-5) for found in scores.values())
    await_it(lambda: not list(find_processes("ray::Decoder")))


class Owner:
    """What a scoring actor does with its decoders."""

    def __init__(self, output: str) -> None:
        self._pool = DecoderPool(run_of(Store(output), "run"), VIEW, output, 1, 1)

    def add(self, count: int, wait_s: float) -> int:
        self._pool.add(count)
        self._pool.admit(wait_s)
        return self._pool.places


def test_decoders_without_a_node_make_an_autoscaler_add_one_until_their_actor_ends(tmp_path: Path) -> None:
    ray.shutdown()  # that of other tests
    with run_autoscaler(2, {"CPU": 1}) as address:
        ray.init(address=address, log_to_driver=False)
        try:
            owner: Any = ray.remote(Owner).options(num_cpus=0).remote(str(tmp_path))
            assert ray.get(owner.add.remote(1, 120)) == 2 and len(worker_nodes()) == 1
            ray.get(owner.add.remote(5, 0))  # more than the cluster may have
            await_it(lambda: len(worker_nodes()) == 2)
            ray.kill(owner)
            await_it(lambda: not worker_nodes())
        finally:
            ray.shutdown()


def test_a_night_that_is_stopped_while_decoders_wait_for_a_node_leaves_no_demand(
    full_cluster: Cluster, tmp_path: Path
) -> None:
    write_slow_photos(tmp_path / "in" / "nut")
    ray.init(address=full_cluster.address, log_to_driver=False)
    night = start(full_cluster, tmp_path / "in", tmp_path / "out")
    await_it(lambda: "Decoder" in actors_alive() or night.poll() is not None)
    night.terminate()
    _, error = night.communicate()
    assert night.returncode == 130, error
    await_it(lambda: not actors_alive())
