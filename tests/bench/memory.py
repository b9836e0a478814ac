"""Measures the peak memory of a scoring actor beyond its model, over shards of 12-megapixel photos. Linux only.

Each kind of file is scored in its own process, which is set up like an actor, once with the threads for 2 cores and
once with those for 8. Every photo gets a mask; the files of a kind are links to one file. The model has random weights,
and batches are full. The figure is the peak of resident memory while scoring, less the resident memory after the model
was loaded. Two shards of one batch share the model: one is decoded while the masks of the other are written.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.images import give_back_freed_memory, list_images, open_dataset
from pipeline.storage import Run, Store
from schemas.job import parse_job
from tests.bench.decoding import make_jpeg
from tests.bench.measuring import print_table, resident_bytes, write_results
from tests.bench.models import compose_base, score_shards
from tests.scoring.runs import cut_batches, load_detector

SIZE = (4000, 3000)
CLASS = "part"


def make_png(deep: bool) -> bytes:
    """The photo as RGB, or its green as 16-bit greyscale, of which the lower byte is noise."""
    photo = Image.open(io.BytesIO(make_jpeg(*SIZE, progressive=False)))
    if deep:
        noise = np.random.default_rng(1).integers(0, 256, SIZE[::-1], dtype=np.uint16)
        photo = Image.fromarray(np.asarray(photo)[:, :, 1].astype(np.uint16) * 256 + noise)
    buffer = io.BytesIO()
    photo.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


KINDS: dict[str, Callable[[], bytes]] = {
    "baseline.jpg": functools.partial(make_jpeg, *SIZE, progressive=False),
    "progressive.jpg": functools.partial(make_jpeg, *SIZE, progressive=True),
    "rgb.png": functools.partial(make_png, deep=False),
    "grey-16-bit.png": functools.partial(make_png, deep=True),
}


def write_weights(model: str, path: Path) -> None:
    save_file({name: part.contiguous() for name, part in open_clip.create_model(model).state_dict().items()}, path)


def write_images(folder: Path, data: bytes, suffix: str, count: int) -> None:
    """folder/CLASS/N.suffix, all of them links to the same bytes."""
    (folder / CLASS).mkdir(parents=True)
    first = folder / CLASS / f"0{suffix}"
    first.write_bytes(data)
    for number in range(1, count):
        os.link(first, folder / CLASS / f"{number}{suffix}")


def score(images: str, output: str, model: str, weights: str, batch: int, cpus: int) -> dict[str, int]:
    """Scores a folder as ScoringActor.load and .score do. Bytes when the model was loaded, and at the peak after."""
    document = {
        "dataset": {"images": images},
        "output": {"uri": output},
        "run_date": "2026-01-02",
        "model": {"name": model, "pretrained": weights, "batch_size": batch},
        "threshold": {"value": 0.0},
    }
    job = parse_job(document)
    source, store = open_dataset(job.dataset, job.storage), Store(job.output.uri)
    shards = cut_batches(list_images(source), batch)
    torch.set_num_threads(cpus)
    give_back_freed_memory()
    detector = load_detector(job)
    prompts = {CLASS: detector.embed(compose_base(CLASS))}
    loaded = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    run = Run("bench", job, model, "0" * 64)
    scored = score_shards(shards, run, detector, prompts, source.store, store, cpus)
    for stats in scored:
        assert not stats.errors and stats.anomalies[CLASS] == stats.images, "every image is to have a mask"
    return {"images": sum(stats.images for stats in scored), "loaded": loaded, "peak": resident_bytes("VmHWM")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=128, help="of each kind")
    parser.add_argument("--cpus", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--score", nargs=2, metavar=("IMAGES", "WEIGHTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.score:
        images, weights = options.score
        with tempfile.TemporaryDirectory() as output:
            print(json.dumps(score(images, output, options.model, weights, options.batch, options.cpus[0])))
        return
    facts: list[dict[str, object]] = []
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch, "weights.safetensors")
        write_weights(options.model, weights)
        for kind in options.kinds:
            data = KINDS[kind]()
            write_images(Path(scratch, kind), data, Path(kind).suffix, options.images)
            for cpus in options.cpus:
                shared = ["--model", options.model, "--batch", str(options.batch), "--cpus", str(cpus)]
                command = [sys.executable, "-m", "tests.bench.memory", *shared, "--score", f"{scratch}/{kind}", weights]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                beyond = (found["peak"] - found["loaded"]) / 1e6
                facts.append({"kind": kind, "cpus": cpus, "file_bytes": len(data), "beyond_mb": round(beyond), **found})
                figures = (len(data) / 1e6, found["loaded"] / 1e6, beyond)
                rows.append((kind, str(max(4, 2 * cpus)), *(f"{figure:,.0f}" for figure in figures)))
    title = f"{options.model}, batch {options.batch}, {options.images} photos of {SIZE[0]} x {SIZE[1]}"
    print_table(title, ("file", "threads", "its MB", "MB with the model loaded", "MB beyond"), rows)
    write_results("memory", {"model": options.model, "batch": options.batch, "runs": facts})


if __name__ == "__main__":
    main()
