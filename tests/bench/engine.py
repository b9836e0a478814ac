"""Measures the overhead of Ray, and how its actors scale on one machine.

One actor through Ray alternates with the same score_shard in a process without Ray: the same threads, the same number
of shards at once, the same images, each with its own output. Then 1 to 8 actors use simulated devices that take a fixed
time per image; everything else is real, so the loss is that of the pool, Ray and the cores. Eight such devices, of
which one may be slower, show how long the end of a night takes, with shards of one size and with those that a night
has. Finally, many actors without work show how many shards per second the driver can hand out. The start of Ray and of
actors happens once a night, and is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
import torch
from PIL import Image

from jobs.planning import Plan, open_source, plan_run
from pipeline.alfa import Detection, Pending, Preprocess, PromptEmbeddings
from pipeline.alfa.explain import explain
from pipeline.engine import ScoringActor, ScoringPool, connect
from pipeline.scoring import Manifest, Shard, ShardStats, cut_shards, write_manifest
from pipeline.storage import Run, open_store
from schemas.job import JobConfig, parse_job
from schemas.prompts import PromptEnsemble
from schemas.tables import MANIFEST
from tests.bench.measuring import print_table, write_results
from tests.bench.models import score_shards

CLASSES = ("bolt", "nut", "pcb", "ring")
CORES = os.cpu_count() or 1
ACTORS = (1, 2, 4, 8)
IDLE_S = 5.0
MANY = 10**6
"""Shards that pools are told of, so that none stops an actor for want of work between two measurements."""
DEVICE_S = 0.1
"""What the fake device takes for an image: so long that eight actors leave two cores half idle."""
DEVICE_SHARD, DEVICE_BATCH = 10, 5
PATCHES = 15
TAIL_SHARD, TAIL_SHARD_S = 8, 0.5
"""Of the rows about the end of a night: the images of a whole shard, and their seconds."""
TAILS = ((144, 5), (36, 1), (20, 1))
"""Numbers of whole shards, and how many times longer one of the actors takes."""


def write_images(root: Path, count: int) -> None:
    """JPEGs of 256 to 512 pixels a side in the folders of the classes: a texture and some noise, as photos have."""
    random = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
    for number in range(count):
        width, height = (int(side) for side in random.integers(256, 513, 2))
        texture = Image.fromarray(random.integers(64, 192, (16, 16, 3), dtype=np.uint8)).resize((width, height))
        pixels = np.asarray(texture) + random.integers(0, 16, (height, width, 1), dtype=np.uint8)
        Image.fromarray(pixels).save(root / CLASSES[number % len(CLASSES)] / f"{number:05}.jpg", quality=90)


def make_job(images: Path, output: Path, engine: dict[str, int], batch_size: int = 32) -> JobConfig:
    return parse_job(
        {
            "dataset": {"images": str(images), "layout": "folders"},
            "output": {"uri": str(output)},
            "run_date": "2026-01-02",
            "model": {"device": "cpu", "batch_size": batch_size},
            "engine": engine,
        }
    )


def plan(job: JobConfig, scratch: str) -> Plan:
    output = open_store(job.output.uri, job.storage)
    return plan_run(job, open_source(job, output), Path(scratch), output)


def shards_of(night: Plan) -> Iterator[Shard]:
    return cut_shards(night.manifest, night.run.job.engine.shard_size)


@functools.cache
def load_lone_actor(job: JobConfig, scratch: str) -> tuple[Plan, ScoringActor, dict[str, PromptEmbeddings]]:
    """A scoring actor as Ray would start it, without Ray; once in a process."""
    night = plan(job, scratch)
    actor = ScoringActor(job, night.weights.sha256, night.source.store.uri(""), CORES)
    actor.load()
    prompts = {item.class_name: actor.embed(item) for item in night.prompts.ensembles}
    return night, actor, prompts


def score_in_process(job: JobConfig, scratch: str) -> float:
    """Seconds for all images."""
    night, actor, prompts = load_lone_actor(job, scratch)
    started = time.perf_counter()
    score_shards(shards_of(night), night.run, actor._detector, prompts, actor._source, actor._output, CORES)
    return time.perf_counter() - started


def score_all(pool: ScoringPool, shards: Iterator[Shard]) -> int:
    """Scores shards; the number of their images."""
    return sum(stats.images for stats in pool.score(shards))


@dataclass(frozen=True)
class Overhead:
    """Seconds of both ways by round; until Ray and the actor were ready; share of the cores that an idle Ray takes."""

    alone_s: list[float]
    by_ray_s: list[float]
    ready_s: float
    idle: float


def measure_overhead(images: Path, outputs: Path, rounds: int, shard_size: int) -> Overhead:
    """Both ways in turns, each in a process that lives through all rounds: processes differ by more than Ray costs."""
    engine = {"actors": 1, "cpus_per_actor": CORES, "shard_size": shard_size}
    alone, by_ray = (make_job(images, outputs / name, engine) for name in ("in-process", "ray"))
    night = plan(by_ray, str(outputs))
    alone_s, by_ray_s = [], []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(score_in_process, alone, str(outputs)).result()
        asked = time.perf_counter()
        with connect(by_ray):
            pool = ScoringPool(night.run, night.weights.sha256, night.source.store.uri(""), MANY)
            pool.embed(night.prompts.ensembles, {})
            ready_s = time.perf_counter() - asked
            score_all(pool, shards_of(night))
            busy = busy_seconds()
            time.sleep(IDLE_S)
            idle = (busy_seconds() - busy) / IDLE_S / CORES
            for _ in range(rounds):
                alone_s.append(process.submit(score_in_process, alone, str(outputs)).result())
                started = time.perf_counter()
                score_all(pool, shards_of(night))
                by_ray_s.append(time.perf_counter() - started)
            pool.close()
    return Overhead(alone_s, by_ray_s, ready_s, idle)


class FixedTimeDetector:
    """A detector whose device takes DEVICE_S for an image, and always finds the same defect."""

    encoder = SimpleNamespace(preprocess=Preprocess((240, 240), (0.5,) * 3, (0.5,) * 3, "bicubic"))

    def embed(self, ensemble: PromptEnsemble) -> PromptEmbeddings:
        prompts = ensemble.prompts
        anomalous = torch.tensor([prompt.side == "anomalous" for prompt in prompts])
        return PromptEmbeddings(ensemble, torch.zeros(len(prompts), 1), anomalous, (), torch.zeros(0, 1))

    def start(self, pixels: torch.Tensor, prompts: Sequence[PromptEmbeddings]) -> Pending:
        time.sleep(DEVICE_S * len(pixels))
        return lambda: [self._find(item) for item in prompts]

    def _find(self, known: PromptEmbeddings) -> Detection:
        grid = np.full((PATCHES, PATCHES), 0.2, dtype=np.float32)
        grid[6:9, 6:9] = 0.9
        ones = np.ones(len(known.ensemble.prompts), dtype=np.float32)
        sides = int((~known.is_anomalous).sum()), int(known.is_anomalous.sum())
        return Detection(
            score=0.8,
            score_global=0.7,
            score_local=0.9,
            score_reference=None,
            shots=0,
            grid=grid,
            defect_grid=np.zeros((0, PATCHES, PATCHES), dtype=np.float32),
            kept=ones > 0,
            kept_normal=sides[0],
            kept_anomalous=sides[1],
            explanation=explain(known.ensemble.prompts, ones, ones),
        )


class FixedTimeActor(ScoringActor):
    """A scoring actor on a device that does nothing but take its time."""

    def load(self) -> None:
        self._detector = FixedTimeDetector()  # type: ignore[assignment]


def measure_scaling(images: Path, outputs: Path, actors: int, shards_an_actor: int) -> dict[str, float]:
    """Images a second of so many actors, once all are loaded and warm, and the share of the cores that is busy."""
    engine = {"actors": actors, "cpus_per_actor": 1, "shard_size": DEVICE_SHARD}
    night = plan(make_job(images, outputs / f"actors-{actors}", engine, DEVICE_BATCH), str(outputs))
    pool = ScoringPool(night.run, night.weights.sha256, night.source.store.uri(""), MANY, FixedTimeActor)
    try:
        await_actors(pool, actors)
        pool.embed(night.prompts.ensembles, {})
        score_all(pool, islice(shards_of(night), actors))
        busy, started = busy_seconds(), time.perf_counter()
        scored = score_all(pool, islice(shards_of(night), actors * shards_an_actor))
        seconds = time.perf_counter() - started
        return {"rate": scored / seconds, "busy": (busy_seconds() - busy) / seconds / CORES}
    finally:
        pool.close()


def await_actors(pool: ScoringPool, actors: int) -> None:
    """Waits until so many actors have loaded their models."""
    while sum(worker.ready for worker in pool._workers) < actors:
        for reference in pool._wait([*pool._starting], soon=True):
            pool._receive(reference)


class NoWorkActor(ScoringActor):
    """A scoring actor that has nothing to do, so that what is measured is the driver."""

    def load(self) -> None:
        """Has no model."""

    def score(self, shard: Shard, run: Run, *_: Any, **__: Any) -> ShardStats:
        return ShardStats(shard.shard_id, 0)


@dataclass(frozen=True)
class DriverRate:
    """Shards a second, and the driver's memory in MB after a tenth of the shards and after all."""

    actors: int
    shards: int
    rate: float
    memory_mb: tuple[float, float]


def measure_driver(folder: Path, actors: int, shards: int) -> DriverRate:
    """How many empty shards the driver hands out in a second."""
    job = make_job(folder, folder / "driver", {"actors": actors, "cpus_per_actor": 1})
    empty = pa.table({"class_name": pa.array([], pa.string())})
    pool = ScoringPool(Run("run", job, "none", ""), "", str(folder), shards, NoWorkActor)
    memory = []
    try:
        await_actors(pool, actors)
        started = time.perf_counter()
        done = pool.score(Shard(f"{number:016x}", empty) for number in range(shards))
        for number, _ in enumerate(done, start=1):
            if number in (shards // 10, shards):
                memory.append(resident_mb())
        return DriverRate(actors, shards, shards / (time.perf_counter() - started), (memory[0], memory[1]))
    finally:
        pool.close()


class UnequalActor(ScoringActor):
    """A scoring actor on a device that only takes its time for an image; the first of them to load takes as many times
    as long as a file says."""

    def load(self) -> None:
        self._image_s = TAIL_SHARD_S / TAIL_SHARD
        slow = Path(self._job.output.uri, "slow")
        with contextlib.suppress(FileNotFoundError):
            self._image_s *= int(slow.rename(slow.with_name("taken")).read_text())

    def embed(self, ensemble: Any) -> Any:
        return SimpleNamespace(ensemble=ensemble)

    def score(self, shard: Shard, run: Run, *_: Any, **__: Any) -> ShardStats:
        with self._turn:
            time.sleep(self._image_s * shard.images.num_rows)
        return ShardStats(shard.shard_id, 0)


def list_nothing(images: int, folder: Path) -> Manifest:
    """A manifest of images that do not exist."""
    names = [f"{number:032x}" for number in range(images)]
    rows = [{"uri": name, "key": name, "class_name": CLASSES[0], "image_id": name} for name in names]
    return write_manifest([pa.RecordBatch.from_pylist(rows, schema=MANIFEST)], folder)


def measure_tail(folder: Path, shards: int, slower: int) -> dict[str, float]:
    """Seconds of so many shards on eight actors of which one is slower, all of one size and cut as a night cuts them,
    divided by the seconds of an ideal split."""
    manifest = list_nothing(shards * TAIL_SHARD, folder)
    rows = pa.Table.from_batches(manifest.batches())
    ways = {
        "of one size": [Shard(f"{n:016x}", rows.slice(n * TAIL_SHARD, TAIL_SHARD)) for n in range(shards)],
        "smaller at the end": list(cut_shards(manifest, TAIL_SHARD)),
    }
    ideal = shards * TAIL_SHARD_S / (max(ACTORS) - 1 + 1 / slower)
    return {way: time_unequal(folder, cut, slower) / ideal for way, cut in ways.items()}


def time_unequal(folder: Path, shards: Sequence[Shard], slower: int) -> float:
    """Seconds of the shards on eight new actors of which one is slower."""
    actors = max(ACTORS)
    output = Path(tempfile.mkdtemp(dir=folder))
    (output / "slow").write_text(str(slower))
    job = make_job(folder, output, {"actors": actors, "cpus_per_actor": 1})
    pool = ScoringPool(Run("run", job, "none", ""), "", str(folder), MANY, UnequalActor)
    try:
        await_actors(pool, actors)
        pool.embed([cast(PromptEnsemble, SimpleNamespace(class_name=CLASSES[0]))], {})
        started = time.perf_counter()
        done = {stats.shard_id for stats in pool.score(iter(shards))}
        seconds = time.perf_counter() - started
        assert len(done) == len(shards)
    finally:
        pool.close()
    return seconds


def print_tail(folder: Path) -> list[dict[str, float]]:
    """Measures the end of a night on a Ray of its own, and prints it."""
    ray.init(address="local", num_cpus=max(ACTORS), include_dashboard=False, logging_level=logging.WARNING)
    try:
        found = [{"shards": n, "slower": slower, **measure_tail(folder, n, slower)} for n, slower in TAILS]
    finally:
        ray.shutdown()
    names = list(found[0])
    rows = [[f"{row[name]:.2f}" if name in names[2:] else f"{row[name]:g}" for name in names] for row in found]
    print_table(f"{max(ACTORS)} actors of which one is slower: time / that of an ideal split", names, rows)
    return found


def resident_mb() -> float:
    """What this process holds of the memory, by /proc."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def busy_seconds() -> float:
    """Seconds for which this machine's cores have been busy since it started; not a number where it is not Linux."""
    known = Path("/proc/stat")
    if not known.exists():
        return math.nan
    user, nice, system, _idle, _waiting, *others = map(int, known.read_text().splitlines()[0].split()[1:])
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")


def print_driver(folder: Path, actors: int, shards: int) -> DriverRate:
    """Measures the driver's rate on a Ray of its own, and prints it."""
    ray.init(address="local", num_cpus=actors, include_dashboard=False, logging_level=logging.WARNING)
    try:
        found = measure_driver(folder, actors, shards)
    finally:
        ray.shutdown()
    first, last = found.memory_mb
    print(
        f"{actors} actors of no work, {shards} empty shards, {CORES} cores: {found.rate:.0f} shards/s; driver "
        f"{first:.0f} MB after a tenth of them, {last:.0f} MB after all"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="at least, so that there are shards enough")
    parser.add_argument("--shard-size", type=int, default=256, help="of the run through Ray")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards-an-actor", type=int, default=12, help=f"of {DEVICE_SHARD} images, on the fake device")
    parser.add_argument("--idle-actors", type=int, default=64, help="that show the driver's rate; 0.3 GB each")
    parser.add_argument("--empty-shards", type=int, default=20_000, help="that those are given")
    parser.add_argument("--only", choices=["tail", "driver"], help="one of the last rows alone")
    options = parser.parse_args()
    if options.only:
        with tempfile.TemporaryDirectory(prefix="alfa-bench-") as folder:
            if options.only == "tail":
                print_tail(Path(folder))
            else:
                print_driver(Path(folder), options.idle_actors, options.empty_shards)
        return
    count = max(options.images, max(ACTORS) * options.shards_an_actor * DEVICE_SHARD)
    with tempfile.TemporaryDirectory(prefix="alfa-bench-") as folder:
        images, outputs = Path(folder) / "images", Path(folder) / "outputs"
        outputs.mkdir()
        write_images(images, count)
        overhead = measure_overhead(images, outputs, options.rounds, options.shard_size)
        ray.init(address="local", num_cpus=max(ACTORS), include_dashboard=False, logging_level=logging.WARNING)
        try:
            scaling = {n: measure_scaling(images, outputs, n, options.shards_an_actor) for n in ACTORS}
        finally:
            ray.shutdown()
        tail = print_tail(outputs)
        driver = print_driver(outputs, options.idle_actors, options.empty_shards)
    ways = [
        (name, f"{count / statistics.median(seconds):.1f}")
        for name, seconds in (("in process", overhead.alone_s), ("through Ray", overhead.by_ray_s))
    ]
    print_table(f"one actor, {count} images, {CORES} cores", ("way", "images/s"), ways)
    ratios = [alone / by_ray for alone, by_ray in zip(overhead.alone_s, overhead.by_ray_s, strict=True)]
    print(
        f"rate through Ray / in process, by round: {', '.join(f'{ratio:.3f}' for ratio in ratios)}; "
        f"median {statistics.median(ratios):.3f}. An idle Ray takes {overhead.idle:.1%} of the cores in both, and once "
        f"a night {overhead.ready_s:.1f} s to be ready."
    )
    one = scaling[1]["rate"]
    rows = [
        (
            str(n),
            f"{found['rate']:.1f}",
            f"{found['rate'] / one:.2f}",
            f"{found['rate'] / one / n:.3f}",
            f"{found['busy']:.0%}",
        )
        for n, found in scaling.items()
    ]
    title = f"devices of {DEVICE_S * 1e3:g} ms an image, {CORES} cores"
    print_table(title, ("actors", "images/s", "speed-up", "speed-up / N", "cores busy"), rows)
    facts = {
        "images": count,
        "shard_size": options.shard_size,
        **asdict(overhead),
        "tail": tail,
        "driver": asdict(driver),
    }
    write_results("engine", {**facts, "device_seconds": DEVICE_S, "scaling": scaling})


if __name__ == "__main__":
    main()
