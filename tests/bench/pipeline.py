"""Measures the cost of files, masks and rows beside the model: whole shards, as actors score them, against the model.

Four runs alternate on the same images: a bare open_clip encode_image loop and the detector, both on decoded pixels in
memory; all of score_shard, from JPEG files to masks, rows and Parquet, with two shards sharing the model; and the same
with a model that takes no time, which shows how fast an actor can feed a faster device. With --actors N there is a
fifth run: N processes share the device and divide the cores, as with engine.actors_per_gpu. With --s3, photos and
results are on a SeaweedFS, which takes its share of the cores. It does not import Ray. The model has random weights,
because only its speed matters.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from pipeline.alfa import Detector, Encoder, Features, PromptEmbeddings
from pipeline.alfa.device import to_device
from pipeline.images import give_back_freed_memory
from pipeline.scoring import Shard, image_decoder, to_tensor
from pipeline.storage import Run, Store, map_ahead
from schemas.job import JobConfig, Method, parse_job
from tests.bench.decoding import make_jpeg
from tests.bench.lock import sample_lock
from tests.bench.measuring import measure, print_table, write_results
from tests.bench.models import DEVICE, SETTLE, build, compose_base, encode_bare, name_device, score_shards
from tests.scoring.runs import shards_of
from tests.seaweed import run_seaweed

SIDES = (240, 512, 768, 1024)
"""Pixels of a side of the photos, which take turns."""

ANOMALOUS = 0.05
"""Share of the photos whose masks show something."""


class TimelessDetector(Detector):
    """Its model sees nothing anew: every batch of a size has the features of the first."""

    def __init__(self, encoder: Encoder, method: Method) -> None:
        super().__init__(encoder, method)
        self._known: dict[int, Features] = {}

    def features(self, pixels: torch.Tensor) -> Features:
        if len(pixels) not in self._known:
            self._known[len(pixels)] = super().features(pixels)
        return self._known[len(pixels)]


def write_photos(store: Store, count: int) -> None:
    photos = [make_jpeg(side, side, progressive=False) for side in SIDES]
    for number in range(count):
        store.write(f"part/{number:05}.jpg", photos[number % len(SIDES)])


def find_place(scratch: str, on_s3: bool, stack: contextlib.ExitStack) -> str:
    """Where photos and results lie."""
    if not on_s3:
        return scratch
    os.environ.update(stack.enter_context(run_seaweed(Path(scratch))).environment)
    return "s3://lake/bench"


def describe_job(folder: str, batch: int, mask_threshold: float) -> JobConfig:
    return parse_job(
        {
            "dataset": {"images": f"{folder}/in"},
            "output": {"uri": f"{folder}/out"},
            "run_date": "2026-01-02",
            "model": {"batch_size": batch},
            "threshold": {"policy": "fixed", "mask_value": mask_threshold},
            "engine": {"shard_size": 2 * batch},
        }
    )


@dataclass(frozen=True)
class Actor:
    """All that score_shard wants but shards, as a scoring actor has it. cpus: its cores."""

    run: Run
    detector: Detector
    prompts: Mapping[str, PromptEmbeddings]
    source: Store
    output: Store
    cpus: int

    def score(self, shards: Sequence[Shard], detector: Detector | None = None) -> None:
        scorer = self.detector if detector is None else detector
        score_shards(shards, self.run, scorer, self.prompts, self.source, self.output, self.cpus)


def build_actor(encoder: Encoder, job: JobConfig, cpus: int) -> Actor:
    detector = Detector(encoder, job.method)
    prompts = {"part": detector.embed(compose_base("part"))}
    run = Run("bench", job, "bench", "0" * 64)
    return Actor(run, detector, prompts, Store(job.dataset.images), Store(job.output.uri), cpus)


_actors: list[Actor] = []
"""The one of this process, where it is one of several that share the device."""


def start_process(model: str, job: JobConfig, cpus: int) -> None:
    torch.set_num_threads(cpus)
    give_back_freed_memory()
    _actors.append(build_actor(build(model)[1], job, cpus))


def score_in_process(shards: Sequence[Shard]) -> None:
    _actors[0].score(shards)


class Processes:
    """Actors in processes of their own, all loaded, that share one device."""

    def __init__(self, count: int, model: str, job: JobConfig, cpus: int) -> None:
        self._pools = [
            ProcessPoolExecutor(1, get_context("spawn"), start_process, (model, job, max(1, cpus // count)))
            for _ in range(count)
        ]
        self.score([])

    def score(self, shards: Sequence[Shard]) -> None:
        parts = [shards[number :: len(self._pools)] for number in range(len(self._pools))]
        for scored in [pool.submit(score_in_process, part) for pool, part in zip(self._pools, parts, strict=True)]:
            scored.result()

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()


def measure_busy(run: Callable[[], object]) -> float:
    """Share of the time of a run in which the GPU did anything, as nvidia-smi samples it."""
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sampling:
        try:
            run()
        finally:
            sampling.terminate()
        samples, _ = sampling.communicate()
    return statistics.mean(float(line) for line in samples.split()) / 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = DEVICE.type == "cuda"
    parser.add_argument("--model", default="ViT-B-16-plus-240" if on_gpu else "ViT-B-16")
    parser.add_argument("--batch", type=int, default=64 if on_gpu else 16)
    parser.add_argument("--images", type=int, default=4096 if on_gpu else 96)
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="cores of the actor, or of all")
    parser.add_argument("--actors", type=int, default=4 if on_gpu else 1)
    parser.add_argument("--s3", action="store_true", help="from and to SeaweedFS, instead of local files")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.cpus)
    give_back_freed_memory()
    clip, encoder = build(options.model)

    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        place = find_place(scratch, options.s3, stack)
        job = describe_job(place, options.batch, 1.0)
        actor = build_actor(encoder, job, options.cpus)
        write_photos(actor.source, options.images)
        decode = image_decoder(job, actor.detector)
        photos = [actor.source.read(info.key) for info in actor.source.list()]
        batches = to_tensor([decode(photo).pixels for photo in photos]).split(options.batch)
        prompts = [actor.prompts["part"]] * options.batch

        def run_bare() -> None:
            for batch in batches:
                encode_bare(clip, (to_device(batch, DEVICE).float() - 127.5) / 127.5)

        def run_detector() -> list[float]:
            with ThreadPoolExecutor(1) as model:
                started = map_ahead(
                    model, lambda batch: actor.detector.start(batch, prompts[: len(batch)]), batches, ahead=2
                )
                return [float(detection.grid.max()) for pending in started for detection in pending()]

        job = describe_job(place, options.batch, float(np.quantile(run_detector(), 1 - ANOMALOUS)))
        actor = replace(actor, run=replace(actor.run, job=job))
        shards = shards_of(job)
        timeless = TimelessDetector(encoder, job.method)
        runs: dict[str, Callable[[], object]] = {
            "bare encode_image": run_bare,
            "detector, value": run_detector,
            "score_shard, from photos to Parquet": lambda: actor.score(shards),
            "the same, the model for nothing": lambda: actor.score(shards, timeless),
        }
        if options.actors > 1:
            processes = Processes(options.actors, options.model, job, options.cpus)
            stack.callback(processes.close)
            runs[f"score_shard in {options.actors} processes"] = lambda: processes.score(shards)
        seconds = measure(runs, options.repetitions, SETTLE)
        busy = {name: measure_busy(run) for name, run in runs.items()} if on_gpu else {}
        beside = stack.enter_context(sample_lock()).measure(lambda: actor.score(shards, timeless))
        core_s, lock_s = beside.core / options.images, beside.lock / options.images
    where = name_device()
    rows = [
        (name, f"{options.images / value:.2f}", f"{seconds['bare encode_image'] / value:.3f}")
        for name, value in seconds.items()
    ]
    kind = "JPEGs on S3" if options.s3 else "JPEG files"
    what = f"{options.model}, {options.images} {kind} of {SIDES[0]} to {SIDES[-1]} px, batch {options.batch}"
    title = f"{what}, {where}, {options.cpus} cores"
    print_table(title, ("run", "images/s", "rate / bare"), rows)
    for name, share in busy.items():
        print(f"{name}: the GPU is busy {share:.0%} of the time")
    print(f"beside the model, an image takes {core_s * 1e3:.1f} ms of a core, {lock_s * 1e3:.2f} ms of Python's lock")
    costs = {"host_core_seconds_an_image": core_s, "host_lock_seconds_an_image": lock_s}
    facts = {"machine": where, **vars(options), "seconds": seconds, "busy": busy, **costs}
    write_results(f"pipeline-{DEVICE.type}{'-s3' if options.s3 else ''}", facts)


if __name__ == "__main__":
    main()
