"""Measures how fast a scoring actor gets its pixels as CPU nodes with decoders are added. Linux only.

The device and the decoders take a fixed time and compute nothing, so that more of them than this machine has cores can
work at once. The rest is real: Ray with one node for the actor and others for decoders, the pool, score_shard, the
pixels of 172 kB an image through the object store. Masks are left to a later pass, as with threshold.policy quantile.
The actor itself decodes with four threads. The first rate is that of the actor alone; in `grown`, it adds decoders by
itself, in the others as many as the nodes have cores.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import ray
import torch
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster

from pipeline.alfa import Detection, Pending, Preprocess, PromptEmbeddings
from pipeline.engine import Decoder, DecoderPool, ScoringActor, ScoringPool
from pipeline.engine.relay import Reply
from pipeline.images import Decoded, ImageError
from pipeline.scoring import Row, Shard, View, scorer
from pipeline.storage import Run
from schemas.job import parse_job
from schemas.prompts import PromptEnsemble
from schemas.tables import MANIFEST
from tests.bench.engine import MANY, await_actors
from tests.bench.measuring import print_table, write_results
from tests.bench.models import compose_base
from tests.processes import find_processes

SIDE, PATCHES = 240, 15
CORES_A_NODE = 2
WITHIN_S = 90.0
"""Seconds within which an actor is to have grown its decoders."""


class SleepingReader:
    """Takes its time for a photo, and returns the same pixels each time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._pixels = np.full((SIDE, SIDE, 3), 128, dtype=np.uint8)

    def read(self, image: Row) -> Decoded | ImageError:
        time.sleep(self._seconds)
        return Decoded(self._pixels.copy(), 512, 512)


class SleepingDecoder(Decoder):
    """A decoder that leaves its core to others.

    It sleeps once for all photos of a call, because each sleep takes some milliseconds too long on a busy machine.
    """

    decode_s = 0.0

    def settle(self) -> str:
        node_id = super().settle()
        self._reader = SleepingReader(0)  # type: ignore[assignment]
        return node_id

    def decode(self, images: Sequence[Row]) -> Reply:
        time.sleep(self.decode_s * len(images))
        return super().decode(images)


class SleepingDetector:
    """A detector whose device takes a fixed time for an image, and finds nothing."""

    encoder = SimpleNamespace(
        preprocess=Preprocess((SIDE, SIDE), (0.5,) * 3, (0.5,) * 3, "bicubic"), grid=(PATCHES, PATCHES)
    )

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.busy_s = 0.0

    def embed(self, ensemble: PromptEnsemble) -> PromptEmbeddings:
        prompts = ensemble.prompts
        anomalous = torch.tensor([prompt.side == "anomalous" for prompt in prompts])
        return PromptEmbeddings(ensemble, torch.zeros(len(prompts), 1), anomalous, (), torch.zeros(0, 1))

    def start(self, pixels: torch.Tensor, prompts: Sequence[PromptEmbeddings]) -> Pending:
        began = time.monotonic()
        time.sleep(self._seconds * len(pixels))
        self.busy_s += time.monotonic() - began
        found = Detection(
            score=0.1,
            score_global=0.1,
            score_local=0.1,
            score_reference=None,
            shots=0,
            score_peers=None,
            peers=0,
            grid=np.full((PATCHES, PATCHES), 0.1, dtype=np.float32),
            peer_distances=None,
            nearest_peer=None,
            defect_grid=np.zeros((0, PATCHES, PATCHES), dtype=np.float32),
            kept=np.ones(len(prompts[0].ensemble.prompts), dtype=bool),
            kept_normal=1,
            kept_anomalous=1,
            explanation=(),
        )
        return lambda: [found] * len(pixels)


class FedActor(ScoringActor):
    """A scoring actor on such a device. fixed: the number of its decoders; None: it adds them by itself."""

    decode_s = device_s = 0.0
    fixed: int | None = None

    def load(self) -> None:
        self._detector = SleepingDetector(self.device_s)  # type: ignore[assignment]
        self._classes = None
        scorer.PhotoReader = lambda *_, **__: SleepingReader(self.decode_s)  # type: ignore[assignment,misc]

    def _share_decoding(self, run: Run) -> DecoderPool:
        if self._decoders is None:
            kind = DecoderPool if self.fixed is None else Unchanging
            decoder = type("Decoder", (SleepingDecoder,), {"decode_s": self.decode_s})
            view = View.of(self._detector)
            self._decoders = kind(run, view, self._source_uri, self._cpus, self._threads, decoder)
            self._decoders.add(self.fixed or 0)
            self._decoders.admit(timeout_s=300)
        return self._decoders

    def busy_s(self) -> float:
        """Seconds for which the device has worked; its sleeps take a little longer than they should."""
        return self._detector.busy_s

    def decoders(self) -> int:
        return 0 if self._decoders is None else self._decoders.places - self._threads


class Unchanging(DecoderPool):
    """Keeps the decoders that it has."""

    def note(self, seconds: float, images: int) -> None:
        pass


@dataclass(frozen=True)
class Fed:
    """What came of so many nodes and decoders.

    rate: images a second. busy: share of the time in which the device worked. ..._core_ms: core time for an image.
    actor_mb, store_mb: peaks of the actor's memory and of all object stores.
    """

    nodes: int
    decoders: int
    rate: float
    busy: float
    actor_core_ms: float
    decoders_core_ms: float
    actor_mb: float
    store_mb: float


def make_shards(count: int, size: int) -> Iterator[Shard]:
    for number in range(count):
        rows = [
            {"uri": f"/{number}/{image}", "key": f"{number}/{image}", "class_name": "part", "image_id": f"{image:032}"}
            for image in range(size)
        ]
        yield Shard(f"{number:016x}", pa.Table.from_pylist(rows, schema=MANIFEST))


class Peaks(threading.Thread):
    """Watches how much memory the actor and the object stores take."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.actor_mb = self.store_mb = 0.0
        self._ended = threading.Event()
        self._pids = list(find_processes(r"ray::FedActor"))
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.5):
            used = 0
            for node in ray.nodes():  # type: ignore[no-untyped-call]
                if node["Alive"]:
                    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False)
                    used += stats.store_stats.object_store_bytes_used
            self.store_mb = max(self.store_mb, used / 1e6)
            self.actor_mb = max(self.actor_mb, *map(_own_mb, self._pids))

    def end(self) -> None:
        self._ended.set()
        self.join()


def _own_mb(pid: int) -> float:
    """Resident memory of a process without what it shares: the object store is counted by itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(kb) for kb in re.findall(r"Rss(?:Anon|File):\s+(\d+) kB", status)) / 1e3


def _core_s(name: str) -> float:
    """Seconds of cores that the running actors of a class have taken."""
    stats = (
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in find_processes(f"^ray::{name}")
    )
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


def measure(cluster: Cluster, nodes: int, decoders: int | None, options: argparse.Namespace) -> Fed:
    """decoders: None lets the actor add them by itself."""
    with tempfile.TemporaryDirectory(prefix="alfa-bench-") as folder:
        job = parse_job(
            {
                "dataset": {"images": folder},
                "output": {"uri": folder},
                "run_date": "2026-01-02",
                "model": {"device": "cpu", "batch_size": 32},
                "threshold": {"policy": "quantile"},
                "peers": "none",
                "engine": {
                    "address": cluster.address, "actors": 1, "cpus_per_actor": 1, "labels": {"part": "gpu"},
                    "decode": "cluster" if decoders != 0 else "actor", "shard_size": options.shard_size,
                },
            }
        )  # fmt: skip
        facts = {"decode_s": options.decode_ms / 1e3, "device_s": options.device_ms / 1e3, "fixed": decoders}
        actor_class = type("FedActor", (FedActor,), facts)
        pool = ScoringPool(Run("run", job, "none", ""), "", folder, MANY, actor_class)
        try:
            await_actors(pool, 1)
            pool.embed([compose_base("part")], {})
            actor = pool._workers[0].actor
            images = options.shard_size
            shards = make_shards(MANY, images)
            for _ in pool.score(islice(shards, 1)):  # decoders start
                pass
            started, deadline = time.monotonic(), time.monotonic() + WITHIN_S
            while decoders is None and time.monotonic() < deadline:
                began, busy = time.monotonic(), ray.get(actor.busy_s.remote())
                done = sum(stats.images for stats in pool.score(islice(shards, 2)))
                rate = done / (time.monotonic() - began)
                count = ray.get(actor.decoders.remote())
                print(f"  {time.monotonic() - started:.0f} s: {count} decoders, {rate:.0f} images/s", flush=True)
                if ray.get(actor.busy_s.remote()) - busy >= 0.9 * (time.monotonic() - began):
                    break
            busy = ray.get(actor.busy_s.remote())
            peaks, cores, began = Peaks(), (_core_s("FedActor"), _core_s("Decoder")), time.monotonic()
            most = max(4, int(options.seconds / options.device_ms * 1e3 / images / (1 if decoders else 3)))
            done = sum(stats.images for stats in pool.score(islice(shards, most)))
            took = time.monotonic() - began
            busy = (ray.get(actor.busy_s.remote()) - busy) / took
            peaks.end()
            spent = [
                (_core_s(name) - known) * 1e3 / done for name, known in zip(("FedActor", "Decoder"), cores, strict=True)
            ]
            return Fed(
                nodes, ray.get(actor.decoders.remote()), done / took, busy, *spent, peaks.actor_mb, peaks.store_mb
            )
        finally:
            pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device-ms", type=float, default=3.0, help="of the device, for an image")
    parser.add_argument("--decode-ms", type=float, default=30.0, help="of a decoder, for an image")
    parser.add_argument("--nodes", type=int, nargs="+", default=[0, 1, 2, 4, 6], help=f"of {CORES_A_NODE} cores each")
    parser.add_argument("--shard-size", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=12.0, help="of a measurement at the device's rate")
    options = parser.parse_args()
    head = {"num_cpus": 1, "num_gpus": 1, "labels": {"part": "gpu"}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    found = []
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        there = 0
        for nodes in options.nodes:
            for _ in range(nodes - there):
                cluster.add_node(num_cpus=CORES_A_NODE)
            there = nodes
            cluster.wait_for_nodes()
            found.append(measure(cluster, nodes, nodes * CORES_A_NODE, options))
            print(found[-1], flush=True)
        grown = measure(cluster, there, None, options)
    finally:
        ray.shutdown()
        cluster.shutdown()
    rows = [
        (
            name,
            str(one.decoders),
            f"{one.rate:.0f}",
            f"{one.busy:.2f}",
            f"{one.actor_core_ms:.2f}",
            f"{one.decoders_core_ms:.2f}",
            f"{one.actor_mb:.0f}",
            f"{one.store_mb:.0f}",
        )
        for name, one in [*((str(one.nodes), one) for one in found), ("grown", grown)]
    ]
    title = f"a device of {options.device_ms:g} ms an image, decoders of {options.decode_ms:g} ms"
    columns = (
        "nodes", "decoders", "images/s", "device busy", "core ms: actor", "decoders", "MB: actor", "stores",
    )  # fmt: skip
    print_table(title, columns, rows)
    write_results("decoders", {**vars(options), "nodes": [asdict(one) for one in found], "grown": asdict(grown)})


if __name__ == "__main__":
    main()
