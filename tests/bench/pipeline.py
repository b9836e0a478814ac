"""What files, masks and rows cost beside the model: shards end to end, as an actor does them, against the model alone.

Four runs take turns on the same images: a bare open_clip encode_image loop and the detector, both on decoded pixels in
memory; all of score_shard, from JPEG files to masks, rows and Parquet, two shards sharing the model; and the same with
a model that takes no time, which is what an actor can feed to a faster device. Imports no Ray. The model has random
weights: only its speed is looked at.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pipeline.alfa import Detector, Encoder
from pipeline.alfa.detector import Features
from pipeline.images import list_images, open_dataset
from pipeline.memory import give_back_freed_memory
from pipeline.scoring import Run, image_decoder, to_tensor
from pipeline.shards import cut_shards
from pipeline.storage import Store
from schemas.job import JobConfig, Method, parse_job
from tests.bench.decoding import make_jpeg
from tests.bench.measuring import measure, print_table, write_results
from tests.bench.models import DEVICE, SETTLE, build, compose_base, encode_bare, name_device, score_shards

SIDES = (240, 512, 768, 1024)
"""Pixels of a side of the photos, which take turns."""

ANOMALOUS = 0.05
"""Share of the photos whose masks show something."""


class TimelessDetector(Detector):
    """Its model sees nothing anew: every batch of a size has the features of the first."""

    def __init__(self, encoder: Encoder, method: Method) -> None:
        super().__init__(encoder, method, "value")
        self._known: dict[int, Features] = {}

    def features(self, pixels: torch.Tensor) -> Features:
        if len(pixels) not in self._known:
            self._known[len(pixels)] = super().features(pixels)
        return self._known[len(pixels)]


def write_photos(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    photos = [make_jpeg(side, side, progressive=False) for side in SIDES]
    for number in range(count):
        (folder / f"{number:05}.jpg").write_bytes(photos[number % len(SIDES)])


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = DEVICE.type == "cuda"
    parser.add_argument("--model", default="ViT-B-16-plus-240" if on_gpu else "ViT-B-16")
    parser.add_argument("--batch", type=int, default=64 if on_gpu else 16)
    parser.add_argument("--images", type=int, default=4096 if on_gpu else 96)
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="cores of the actor")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.cpus)
    give_back_freed_memory()
    clip, encoder = build(options.model)
    job = describe_job("memory://bench", options.batch, 1.0)
    detector = Detector(encoder, job.method, "value")
    prompts = {"part": detector.embed(compose_base("part"))}

    with tempfile.TemporaryDirectory() as scratch:
        write_photos(Path(scratch) / "in" / "part", options.images)
        decode = image_decoder(job, detector)
        paths = sorted((Path(scratch) / "in" / "part").iterdir())
        pixels = to_tensor([decode(path.read_bytes()).pixels for path in paths])

        def run_bare() -> None:
            for batch in pixels.split(options.batch):
                encode_bare(clip, (batch.to(DEVICE).float() - 127.5) / 127.5)

        def run_detector() -> list[float]:
            return [
                float(detection.grid.max())
                for batch in pixels.split(options.batch)
                for detection in detector.detect(batch, [prompts["part"]] * len(batch))
            ]

        job = describe_job(scratch, options.batch, float(np.quantile(run_detector(), 1 - ANOMALOUS)))
        run, source, output = Run("bench", job, "bench", "0" * 64), Store(job.dataset.images), Store(job.output.uri)
        shards = list(cut_shards(list_images(open_dataset(job.dataset, job.storage)), job.engine.shard_size))

        def run_shards(scorer: Detector) -> None:
            score_shards(shards, run, scorer, prompts, source, output, options.cpus)

        timeless = TimelessDetector(encoder, job.method)
        runs: dict[str, Callable[[], object]] = {
            "bare encode_image": run_bare,
            "detector, value": run_detector,
            "score_shard, from files to Parquet": functools.partial(run_shards, detector),
            "the same, the model for nothing": functools.partial(run_shards, timeless),
        }
        seconds = measure(runs, options.repetitions, SETTLE)
        before = time.process_time()
        run_shards(timeless)
        host_s = (time.process_time() - before) / options.images
    where = name_device()
    rows = [
        (name, f"{options.images / value:.2f}", f"{seconds['bare encode_image'] / value:.3f}")
        for name, value in seconds.items()
    ]
    what = f"{options.model}, {options.images} JPEGs of {SIDES[0]} to {SIDES[-1]} px, batch {options.batch}"
    title = f"{what}, {where}, {options.cpus} cores"
    print_table(title, ("run", "images/s", "rate / bare"), rows)
    print(f"beside the model, an image takes {host_s * 1e3:.1f} ms of a core")
    facts = {"machine": where, **vars(options), "seconds": seconds, "host_core_seconds_an_image": host_s}
    write_results(f"pipeline-{DEVICE.type}", facts)


if __name__ == "__main__":
    main()
