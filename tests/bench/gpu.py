"""Measures all that a GPU decides, in at most eight minutes and without Ray: one row for each question.

The two sides of a row take turns, and their medians are compared. Rows are independent: one that fails prints its
error, and the others go on; the exit code is then 1. The model has random weights, because only its speed matters.
Without a GPU the rows that need none are measured on the CPU.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import pipeline.alfa.encoder
from pipeline.alfa import Detector, PromptEmbeddings
from pipeline.alfa.device import to_device
from pipeline.images import give_back_freed_memory
from pipeline.scoring import Shard, image_decoder, to_tensor
from pipeline.storage import Store
from schemas.job import EMBEDDED_MODEL, Method
from tests.bench.detector import with_peers
from tests.bench.measuring import measure, write_results
from tests.bench.models import DEVICE, build, compose_base, encode_bare, name_device
from tests.bench.pipeline import ANOMALOUS, Actor, build_actor, describe_job, measure_busy, write_photos
from tests.scoring.runs import shards_of

LAST_START_S = 400.0
"""Rows that have not begun by then are left out, so that all is over in eight minutes."""

MOST_ROUNDS = 50


class Skipped(Exception):
    """A row cannot be measured here. The message says why."""


@dataclass(frozen=True)
class Options:
    model: str
    batch: int
    images: int
    seconds: float
    device: str


@dataclass(frozen=True)
class Outcome:
    """What a row has measured. figure: None where it was skipped or has failed. note: rates, or the reason."""

    figure: float | None
    note: str
    failed: bool = False


class Bench:
    """A model, and what rows need of it. folder: for photos and results."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.device = torch.device(options.device)
        self.clip, self.encoder = build(options.model, self.device)
        self.method = Method(aligner="raw" if options.model == EMBEDDED_MODEL else "value")
        self.pixels = torch.randint(0, 256, (options.batch, 3, *self.encoder.preprocess.size), dtype=torch.uint8)
        self.batches = max(1, options.images // options.batch)
        self.cpus = os.cpu_count() or 1

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def require_cuda(self) -> None:
        if self.device.type != "cuda":
            raise Skipped("needs CUDA")

    def compare(self, images: int, runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Images a second of each run, which are of so many images. They take turns for the seconds of a row."""
        seconds = measure(runs, 1, self.settle)
        rounds = min(MOST_ROUNDS, int(self.options.seconds / sum(seconds.values())))
        if rounds > 1:
            seconds = measure(runs, rounds, self.settle)
        return {name: images / value for name, value in seconds.items()}

    @functools.cached_property
    def night(self) -> tuple[Actor, Sequence[Shard]]:
        """An actor and its shards of JPEG files; a few of the masks show something."""
        job = describe_job(str(self.folder), self.options.batch, 1.0)
        write_photos(Store(job.dataset.images), self.options.images)
        actor = build_actor(self.encoder, job, self.cpus)
        decode = image_decoder(job, actor.detector)
        infos = list(actor.source.list())[: self.options.batch]
        pixels = to_tensor([decode(actor.source.read(info.key)).pixels for info in infos])
        found = actor.detector.detect(pixels, [actor.prompts["part"]] * len(pixels))
        highest = float(np.quantile([detection.grid.max() for detection in found], 1 - ANOMALOUS))
        job = describe_job(str(self.folder), self.options.batch, highest)
        shards = shards_of(job)
        return replace(actor, run=replace(actor.run, job=job)), shards

    def encode(self, pixels: Tensor) -> object:
        """The forward pass of the detector, by its default method."""
        blocks = self.encoder.blocks
        return self.encoder.encode_images(pixels, levels=(blocks - 1,), value_depth=blocks - blocks // 4)

    def eager(self, pixels: Tensor) -> Callable[[], None]:
        """Encodes all batches as the detector does. pixels: on the device, taken for each batch."""

        def run() -> None:
            for _ in range(self.batches):
                self.encode(pixels)

        return run


def measure_actor(bench: Bench) -> Outcome:
    actor, shards = bench.night
    decode = image_decoder(actor.run.job, actor.detector)
    with ThreadPoolExecutor(bench.cpus) as pool:
        photos = pool.map(actor.source.read, [info.key for info in actor.source.list()])
        decoded = list(pool.map(decode, photos))
    pixels = to_tensor([one.pixels for one in decoded]).split(bench.options.batch)

    def run_bare() -> None:
        for batch in pixels:
            encode_bare(bench.clip, (to_device(batch, bench.device).float() - 127.5) / 127.5)

    rates = bench.compare(len(decoded), {"bare": run_bare, "actor": lambda: actor.score(shards)})
    return Outcome(rates["actor"] / rates["bare"], describe(rates))


def measure_busy_share(bench: Bench) -> Outcome:
    bench.require_cuda()
    actor, shards = bench.night
    actor.score(shards)

    def run() -> None:
        started = time.perf_counter()
        while time.perf_counter() - started < bench.options.seconds:
            actor.score(shards)

    return Outcome(measure_busy(run), "sampled by nvidia-smi")


def measure_detector(bench: Bench) -> Outcome:
    detector = Detector(bench.encoder, bench.method)
    prompts = [detector.embed(compose_base("part"))] * bench.options.batch
    ready = bench.pixels.to(bench.device).float()

    def run_bare() -> None:
        for _ in range(bench.batches):
            encode_bare(bench.clip, ready)

    def run_detector() -> None:
        for pending in [detector.start(bench.pixels, prompts) for _ in range(bench.batches)]:
            pending()

    rates = bench.compare(bench.batches * bench.options.batch, {"bare": run_bare, "detector": run_detector})
    return Outcome(rates["bare"] / rates["detector"], describe(rates))


def measure_peers(bench: Bench) -> Outcome:
    alone = Detector(bench.encoder, bench.method)
    prompts = [alone.embed(compose_base("part"))] * bench.options.batch
    compared, known = with_peers(bench.encoder, bench.method, compose_base("part"), bench.options.batch)

    def run(detector: Detector, given: Sequence[PromptEmbeddings]) -> None:
        for pending in [detector.start(bench.pixels, given) for _ in range(bench.batches)]:
            pending()

    runs = {"alone": lambda: run(alone, prompts), "32 peers": lambda: run(compared, known)}
    rates = bench.compare(bench.batches * bench.options.batch, runs)
    return Outcome(rates["alone"] / rates["32 peers"], describe(rates))


def measure_nvjpeg(bench: Bench) -> Outcome:
    bench.require_cuda()
    from torchvision.io import ImageReadMode, decode_jpeg  # its absence fails this row alone

    actor, _ = bench.night
    decode, size = image_decoder(actor.run.job, actor.detector), bench.encoder.preprocess.size
    photos = [actor.source.read(info.key) for info in actor.source.list()][: bench.options.batch]
    files = [torch.frombuffer(bytearray(photo), dtype=torch.uint8) for photo in photos]

    def run_nvjpeg() -> Tensor:
        decoded = decode_jpeg(files, mode=ImageReadMode.RGB, device=bench.device)
        resized = [F.interpolate(one[None].float(), size, mode="bicubic", antialias=True) for one in decoded]
        return torch.cat(resized).round().clamp(0, 255).to(torch.uint8)

    with ThreadPoolExecutor(bench.cpus) as pool:

        def run_cpu() -> Tensor:
            return to_device(to_tensor([one.pixels for one in pool.map(decode, photos)]), bench.device)

        rates = bench.compare(len(photos), {"CPU": run_cpu, "nvJPEG": run_nvjpeg})
    return Outcome(rates["nvJPEG"] / rates["CPU"], f"{describe(rates)}; CPU with {bench.cpus} threads")


def measure_compiled(bench: Bench) -> Outcome:
    pixels = bench.pixels.to(bench.device)
    compiled = torch.compile(pipeline.alfa.encoder.run_block)

    def run_compiled() -> None:
        with mock.patch.object(pipeline.alfa.encoder, "run_block", compiled):
            for _ in range(bench.batches):
                bench.encode(pixels)

    rates = bench.compare(bench.batches * bench.options.batch, {"eager": bench.eager(pixels), "compiled": run_compiled})
    return Outcome(rates["compiled"] / rates["eager"], describe(rates))


def measure_graph(bench: Bench) -> Outcome:
    bench.require_cuda()
    pixels = bench.pixels.to(bench.device)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # warm up where nothing is captured, as PyTorch asks
        for _ in range(3):
            bench.encode(pixels)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        features = bench.encode(pixels)  # kept: its memory is the graph's output

    def replay() -> object:
        for _ in range(bench.batches):
            graph.replay()
        return features

    rates = bench.compare(bench.batches * bench.options.batch, {"eager": bench.eager(pixels), "graph": replay})
    return Outcome(rates["graph"] / rates["eager"], describe(rates))


@dataclass(frozen=True)
class Row:
    """A question. aim: what the figure should be."""

    name: str
    aim: str
    measure: Callable[[Bench], Outcome]


ROWS = (
    Row("detector: time over bare encode_image", "<= 1.15", measure_detector),
    Row("32 peers: time over none", "<= 1.15", measure_peers),
    Row("actor: rate over bare encode_image", ">= 0.9", measure_actor),
    Row("actor: busy share of the device", ">= 0.9", measure_busy_share),
    Row("nvJPEG: rate over decoding on the CPU", "> 1", measure_nvjpeg),
    Row("CUDA graph: rate over eager", ">= 1.1", measure_graph),
    Row("torch.compile: rate over eager", ">= 1.1", measure_compiled),
)


def describe(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {rate:.4g}" for name, rate in rates.items()) + " images/s"


def measure_row(row: Row, bench: Bench, started: float) -> Outcome:
    """Measures a row. started: when the script began, as time.perf_counter counts."""
    if time.perf_counter() - started > LAST_START_S:
        return Outcome(None, f"left out: {LAST_START_S:.0f} s had passed", failed=True)
    try:
        return row.measure(bench)
    except Skipped as reason:
        return Outcome(None, f"skipped: {reason}")
    except Exception as error:  # the other rows may work
        return Outcome(None, f"failed: {type(error).__name__}: {str(error)[:300]}", failed=True)


def measure_rows(rows: Sequence[Row], options: Options) -> dict[str, Outcome]:
    """Measures and prints the rows in order."""
    started, outcomes = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        where = f"{name_device(bench.device)}, {bench.cpus} cores"
        print(f"{options.model} with random weights, batch {options.batch}, {options.images} images, {where}")
        for row in rows:
            outcome = outcomes[row.name] = measure_row(row, bench, started)
            figure = "-" if outcome.figure is None else f"{outcome.figure:.3f}"
            print(f"{row.name:<40} {figure:>8}   aim {row.aim:<8} {outcome.note}", flush=True)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = DEVICE.type == "cuda"
    parser.add_argument("--model", default="ViT-B-16-plus-240")
    parser.add_argument("--batch", type=int, default=64 if on_gpu else 8)
    parser.add_argument("--images", type=int, default=4096 if on_gpu else 24)
    parser.add_argument("--seconds", type=float, default=30.0, help="of a row")
    parser.add_argument("--device", default=DEVICE.type)
    options = Options(**vars(parser.parse_args()))
    give_back_freed_memory()  # as a scoring actor does
    outcomes = measure_rows(ROWS, options)
    rows = {name: asdict(outcome) for name, outcome in outcomes.items()}
    kind = torch.device(options.device).type
    write_results(f"gpu-{kind}", {**asdict(options), "rows": rows})
    sys.exit(any(outcome.failed for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
