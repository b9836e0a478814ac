"""Measures core time and lock time of an image by stage, next to the floor of each: what a fast library alone takes.

Core time is that of all threads of this process. Lock time is how long the interpreter's lock is held, see
tests.bench.lock. Stages are the functions that actors call, in one thread. Rounds of all stages interleave, and medians
are compared. The model's forward pass is left out: the detector scores the features of an earlier batch. Photos have a
sensor's noise, and every mask shows something. Most masks of a night are empty, and skip the stages mask, regions and
PNG. Objects on S3 are on a SeaweedFS beside this process.
"""

from __future__ import annotations

import argparse
import functools
import io
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import obstore
import pyarrow as pa
import simplejpeg
import torch
import torch.nn.functional as F
from isal import isal_zlib
from numpy.typing import NDArray
from obstore.store import S3Store
from PIL import Image

from pipeline.alfa.device import to_device
from pipeline.images import Decoded, ImageError, decoding, draw_mask, encode_mask, find_regions, give_back_freed_memory
from pipeline.scoring import Thresholds, image_decoder, to_tensor
from pipeline.scoring.scorer import Row, _new_rows, write_mask
from pipeline.storage import Store, encode_shard
from schemas.job import parse_job
from schemas.tables import SHARD
from tests.bench.decoding import make_jpeg
from tests.bench.lock import Cost, LockSampler, sample_lock
from tests.bench.measuring import print_table, write_results
from tests.bench.models import build
from tests.bench.pipeline import Actor, TimelessDetector, build_actor
from tests.seaweed import ACCESS_KEY, SECRET_KEY, run_seaweed

MARGIN = 2
"""A JPEG is decoded at a reduced size, whose sides are at least this many times the wanted ones."""

PEAK = 0.9
THRESHOLDS = Thresholds(0.5, PEAK / 2)
OF_MASKS = ("mask", "regions", "PNG")
"""The stages that an image skips whose map is below the threshold."""


@dataclass(frozen=True)
class Stage:
    """One step of an image's way.

    run: takes it with `images` images. part: the stage that run takes, too; its time is subtracted. floor: the same
    work for as many images by a library alone, which `by` names; None where there is none.
    """

    name: str
    run: Callable[[], object]
    images: int = 1
    part: str | None = None
    floor: Callable[[], object] | None = None
    by: str = ""


@dataclass(frozen=True)
class Figures:
    """Seconds of an image in a stage. floor: core time; None where there is no floor."""

    core: float
    lock: float
    floor: float | None
    by: str


@dataclass(frozen=True)
class Place:
    """Where photos and masks lie. read, write: do so by a key, without alfa."""

    name: str
    store: Store
    read: Callable[[str], object]
    write: Callable[[str, bytes], object]


def measure_stages(stages: Sequence[Stage], sampler: LockSampler, rounds: int, seconds: float) -> dict[str, Figures]:
    """Medians over the rounds. seconds: how long each stage and each floor runs in each round."""
    runs = {(stage.name, False): stage.run for stage in stages}
    runs |= {(stage.name, True): stage.floor for stage in stages if stage.floor is not None}
    times = {key: _count_runs(run, seconds) for key, run in runs.items()}
    costs: dict[tuple[str, bool], list[Cost]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            costs[key].append(_measure(sampler, run, times[key]))
    images = {stage.name: stage.images for stage in stages}

    def median(name: str, of_floor: bool = False) -> Cost:
        some = costs[name, of_floor]
        core, lock = statistics.median(cost.core for cost in some), statistics.median(cost.lock for cost in some)
        return Cost(core / images[name], lock / images[name])

    figures = {}
    for stage in stages:
        whole, part = median(stage.name), median(stage.part) if stage.part else Cost(0.0, 0.0)
        floor = None if stage.floor is None else median(stage.name, of_floor=True).core
        figures[stage.name] = Figures(whole.core - part.core, whole.lock - part.lock, floor, stage.by)
    return figures


def _count_runs(run: Callable[[], object], seconds: float) -> int:
    """How many runs take the given time. It also warms up."""
    run()
    started = time.perf_counter()
    run()
    return max(1, math.ceil(seconds / (time.perf_counter() - started)))


def _measure(sampler: LockSampler, run: Callable[[], object], times: int) -> Cost:
    def repeat() -> None:
        for _ in range(times):
            run()

    cost = sampler.measure(repeat)
    return Cost(cost.core / times, cost.lock / times)


def make_png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(make_jpeg(side, side, progressive=False))).save(buffer, "PNG")
    return buffer.getvalue()


def find_deflated(png: bytes) -> bytes:
    """The compressed bytes of a PNG: the content of its IDAT chunks."""
    parts, place = [], 8
    while place < len(png):
        end = place + 8 + int.from_bytes(png[place : place + 4], "big")
        if png[place + 4 : place + 8] == b"IDAT":
            parts.append(png[place + 8 : end])
        place = end + 4
    return b"".join(parts)


def build_timeless_actor(model: str, batch: int, folder: Path) -> Actor:
    """An actor whose model takes no time. folder: for its results."""
    places = {"dataset": {"images": str(folder / "in")}, "output": {"uri": str(folder / "out")}}
    job = parse_job({**places, "run_date": "2026-01-02", "model": {"batch_size": batch}})
    encoder = build(model)[1]
    actor = build_actor(encoder, job, 1)
    return Actor(actor.run, TimelessDetector(encoder, job.method), actor.prompts, actor.source, actor.output, 1)


def cut_corner(pixels: NDArray[np.uint8], size: tuple[int, int], interpolation: str) -> NDArray[np.uint8]:
    """Takes the place of resizing, and takes no time."""
    return np.ascontiguousarray(pixels[: size[0], : size[1]])


def stages_of_pixels(actor: Actor, data: bytes) -> list[Stage]:
    """From a photo's bytes to the model."""

    def decode_alone() -> object:
        decoding.resize, resize = cut_corner, decoding.resize
        try:
            return decode(data)
        finally:
            decoding.resize = resize

    size, count = actor.detector.encoder.preprocess.size, actor.run.job.model.batch_size
    decode = image_decoder(actor.run.job, actor.detector)
    if data.startswith(b"\xff\xd8"):
        scaled = functools.partial(
            simplejpeg.decode_jpeg, data, "RGB", min_height=MARGIN * size[0], min_width=MARGIN * size[1]
        )
        source, floor, by = scaled(), scaled, "simplejpeg, reduced"
    else:
        source = np.asarray(Image.open(io.BytesIO(data)))
        floor, by = functools.partial(isal_zlib.decompress, find_deflated(data)), "ISA-L, inflating"
    barely_decoded = torch.from_numpy(source.copy()).permute(2, 0, 1)[None]
    pixels = [decode(data).pixels] * count
    stacked, target = np.stack(pixels), np.empty((count, *size, 3), np.uint8)
    tensor, prompts = to_tensor(pixels), [actor.prompts["part"]] * count
    return [
        Stage("decode", decode_alone, floor=floor, by=by),
        Stage(
            "resize",
            lambda: decode(data),
            part="decode",
            floor=lambda: F.interpolate(barely_decoded, size, mode="bicubic", antialias=True),
            by="torch, uint8",
        ),
        Stage(
            "hand over",
            lambda: to_device(to_tensor(pixels), actor.detector.encoder.device),
            count,
            floor=lambda: np.copyto(target, stacked),
            by="memcpy",
        ),
        Stage("around the model", lambda: actor.detector.detect(tensor, prompts), count),
    ]


def mark(grid: NDArray[np.float32]) -> NDArray[np.float32]:
    """A map of the same size, of which only the middle patch shows something."""
    marked = np.full_like(grid, PEAK / 9)
    marked[grid.shape[0] // 2, grid.shape[1] // 2] = PEAK
    return marked


def stages_of_results(actor: Actor, data: bytes) -> list[Stage]:
    """From the model's results to the bytes of masks and shards."""
    decoded = image_decoder(actor.run.job, actor.detector)(data)
    batch, count = actor.run.job.model.batch_size, actor.run.job.engine.shard_size
    found = actor.detector.detect(to_tensor([decoded.pixels] * batch), [actor.prompts["part"]] * batch)
    images: list[tuple[Row, Decoded | ImageError]] = [
        (_list_image(number, len(data)), decoded) for number in range(count)
    ]
    detections = [found[number % batch] for number in range(count)]
    grid, defects, names = mark(found[0].grid), found[0].defect_grid, actor.prompts["part"].defects
    height, width = decoded.source_height, decoded.source_width

    def new_rows() -> list[Row]:
        return list(_new_rows(images, detections, "0" * 16, actor.run, actor.prompts))

    first = {"peer_grid": None, **new_rows()[0], "grid": grid.ravel()}
    finished = [write_mask(first, THRESHOLDS, "bench", actor.run, actor.output)] * count

    def build_table() -> pa.Table:
        return pa.Table.from_pylist(finished, schema=SHARD)

    def make_rows() -> object:
        return new_rows(), build_table()

    mask, scratch = draw_mask(grid, width, height, THRESHOLDS.mask), np.empty((height, width + 1), np.uint8)
    table, lz4 = build_table(), pa.Codec("lz4")
    chunks = (chunk for column in table.columns for chunk in column.chunks)
    columns = b"".join(buffer for chunk in chunks for buffer in chunk.buffers() if buffer is not None)
    return [
        Stage(
            "mask",
            lambda: draw_mask(grid, width, height, THRESHOLDS.mask),
            floor=lambda: np.copyto(scratch, mask.lines),
            by="memcpy",
        ),
        Stage("regions", lambda: find_regions(mask, names, defects)),
        Stage(
            "PNG", lambda: encode_mask(mask), floor=lambda: isal_zlib.compress(mask.lines.data, 1), by="ISA-L, level 1"
        ),
        Stage("rows", make_rows, count, floor=lambda: table.take(np.arange(count)), by="Arrow, a copy"),
        Stage("shard file", lambda: encode_shard(table), count, floor=lambda: lz4.compress(columns), by="LZ4 alone"),
    ]


def _list_image(number: int, size: int) -> Row:
    """A row of a manifest."""
    key = f"part/{number:05}.jpg"
    return {
        "uri": f"s3://lake/in/{key}",
        "key": key,
        "class_name": "part",
        "size": size,
        "etag": f"{number:032x}",
        "image_id": f"{number:032x}",
    }


def stages_of_place(place: Place, data: bytes, mask_png: bytes) -> list[Stage]:
    """Reading a photo, and writing a mask."""
    place.store.write("photo", data)
    uri = place.store.uri("photo")
    return [
        Stage(
            f"read, {place.name}", lambda: place.store.read_uri(uri), floor=lambda: place.read("photo"), by="plain read"
        ),
        Stage(
            f"write, {place.name}",
            lambda: place.store.write("mask.png", mask_png),
            floor=lambda: place.write("plain.png", mask_png),
            by="plain write",
        ),
    ]


def open_local(folder: Path) -> Place:
    folder.mkdir()

    def write(key: str, data: bytes) -> None:
        with (folder / f"{key}.new").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / f"{key}.new", folder / key)

    return Place("local", Store(str(folder)), lambda key: (folder / key).read_bytes(), write)


def open_s3(scratch: Path, stack: ExitStack) -> Place:
    server = stack.enter_context(run_seaweed(scratch))
    os.environ.update(server.environment)
    plain = S3Store(
        server.bucket,
        endpoint=server.endpoint,
        region="us-east-1",
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET_KEY,
        client_options={"allow_http": True},
    )
    return Place(
        "S3",
        Store(f"s3://{server.bucket}/bench"),
        lambda key: bytes(obstore.get(plain, f"bench/{key}").bytes()),
        lambda key, data: obstore.put(plain, f"bench/{key}", data, use_multipart=False),
    )


def measure_photo(
    actor: Actor, places: Sequence[Place], data: bytes, sampler: LockSampler, rounds: int, seconds: float
) -> dict[str, Figures]:
    """All stages of a photo, and their sums."""
    results = stages_of_results(actor, data)
    mask_png = next(stage.run() for stage in results if stage.name == "PNG")
    assert isinstance(mask_png, bytes)
    transfers = [stage for place in places for stage in stages_of_place(place, data, mask_png)]
    stages = [*transfers[::2], *stages_of_pixels(actor, data), *results, *transfers[1::2]]
    figures = measure_stages(stages, sampler, rounds, seconds)
    return figures | sum_up(figures, [place.name for place in places])


def sum_up(figures: Mapping[str, Figures], places: Sequence[str]) -> dict[str, Figures]:
    """The sums over the stages, for images whose masks show something or nothing, in each place."""
    sums = {}
    for place in places:
        elsewhere = {f"{way}, {other}" for way in ("read", "write") for other in places if other != place}
        for what, skipped in (("masked", set[str]()), ("empty mask", set(OF_MASKS))):
            some = [item for name, item in figures.items() if name not in elsewhere | skipped]
            core, lock = sum(item.core for item in some), sum(item.lock for item in some)
            sums[f"sum, {place}, {what}"] = Figures(core, lock, sum(item.floor or 0.0 for item in some), "")
    return sums


def print_figures(title: str, figures: Mapping[str, Figures]) -> None:
    rows = [
        (
            name,
            f"{item.core * 1e3:.2f}",
            f"{item.lock * 1e3:.2f}",
            "" if item.floor is None else f"{item.floor * 1e3:.2f}",
            item.by,
        )
        for name, item in figures.items()
    ]
    columns = ("stage", "core, ms", "lock, ms", "floor, ms", "floor by")
    print_table(f"{title}, an image", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16-plus-240")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a stage in a round")
    options = parser.parse_args()
    photos: dict[str, Callable[[], bytes]] = {
        "JPEG of 512 x 512": lambda: make_jpeg(512, 512, progressive=False),
        "JPEG of 4000 x 3000": lambda: make_jpeg(4000, 3000, progressive=False),
        "PNG of 1000 x 1000": lambda: make_png(1000),
    }
    give_back_freed_memory()  # as a scoring actor does
    facts = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        actor = build_timeless_actor(options.model, options.batch, Path(scratch))
        (server := Path(scratch) / "server").mkdir()
        places = [open_local(Path(scratch) / "plain"), open_s3(server, stack)]
        sampler = stack.enter_context(sample_lock())
        torch.set_num_threads(1)
        for name, make in photos.items():
            data = make()
            figures = measure_photo(actor, places, data, sampler, options.rounds, options.seconds)
            print_figures(f"{name}, {len(data):,} bytes", figures)
            facts[name] = {stage: asdict(item) for stage, item in figures.items()}
    write_results("stages", {**vars(options), "photos": facts})


if __name__ == "__main__":
    main()
