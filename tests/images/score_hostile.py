"""Scores the images of a folder in this process, and prints the memory that it took as JSON.

    python -m tests.images.score_hostile IMAGES OUTPUT PIXELS

PIXELS: dataset.max_pixels, and the pixels that all threads may hold at once. The memory is the peak of the process,
less its memory after scoring valid photos.
"""

from __future__ import annotations

import json
import resource
import sys
import time

from pipeline.images import budget, list_images, open_dataset
from pipeline.prompts import compose_ensemble, obtain
from pipeline.scoring import score_shard
from pipeline.storage import Run, Store
from schemas.job import Dataset, parse_job
from tests.places import DEMO
from tests.scoring.runs import cut_batches, load_detector


def peak_bytes() -> int:
    """The most memory that this process has had in RAM so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(images: str, output_uri: str, pixels: int) -> None:
    """All in one process, as in a scoring actor."""
    budget.PIXELS.most = pixels
    budget.give_back_freed_memory()
    document = {"dataset": {"images": images, "max_pixels": pixels}, "output": {"uri": output_uri}}
    settings = {
        "run_date": "2026-01-02",
        "threshold": {"value": 0.1},
        "model": {"batch_size": 16},
    }  # full with whole photos
    job = parse_job({**document, **settings})
    detector = load_detector(job)
    output = Store(job.output.uri)
    prompts = detector.embed(compose_ensemble(obtain(output, "hazelnut", job.prompts, owner="test"), lambda _: True))

    def score(dataset: Dataset, run_id: str) -> None:
        source = open_dataset(dataset, job.storage)
        for shard in cut_batches(list_images(source), job.engine.shard_size):
            names = dict.fromkeys(shard.images.column("class_name").to_pylist(), prompts)
            score_shard(
                shard, Run(run_id, job, "alfa-small", "0" * 64), detector, names, source.store, output, threads=8
            )

    for number in range(3):
        score(Dataset(images=str(DEMO)), f"whole-{number}")
    before, started = peak_bytes(), time.monotonic()
    score(job.dataset, "hostile")
    print(json.dumps({"peak": peak_bytes() - before, "seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
