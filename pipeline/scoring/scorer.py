"""Scores a shard: reads, decodes and scores its images, and writes masks and then rows, which mark it as finished.

Threads read and decode ahead of the model and write masks behind it, so that the model, which has a thread of its own,
does not wait.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.alfa import Detection, Detector, Pending, PromptEmbeddings
from pipeline.images import (
    PIXELS,
    Decoded,
    ImageError,
    Isolation,
    draw_mask,
    encode_empty_mask,
    encode_map,
    encode_mask,
    find_regions,
    upsample,
)
from pipeline.scoring.batches import View, batch_size, batches, start
from pipeline.scoring.memories import Classes
from pipeline.scoring.reading import Decoders, PhotoReader, Row
from pipeline.scoring.shards import Shard
from pipeline.scoring.thresholds import Thresholds, fixed_thresholds
from pipeline.storage import Run, Store, encode_shard, map_ahead, paths, read_shard, redact
from schemas.tables import SHARD, ErrorType

_Batch = list[tuple[Row, Decoded | ImageError]]

_Context = contextlib.AbstractContextManager[Any]
_ALONE = contextlib.nullcontext()

_CHUNK = 8
"""Photos that are handed to another process at once: so few that many processes share a shard."""


@dataclass(frozen=True)
class ShardStats:
    """Counts of a shard. errors: images without a score, by type; anomalies: anomalous images, by class."""

    shard_id: str
    images: int
    errors: Mapping[str, int] = field(default_factory=dict)
    anomalies: Mapping[str, int] = field(default_factory=dict)
    clipped: int = 0
    """Photos with values beyond the depth of their class."""


def score_shard(
    shard: Shard,
    run: Run,
    detector: Detector,
    prompts: Classes,
    source: Store,
    output: Store,
    threads: int,
    *,
    turn: _Context = _ALONE,
    guard: _Context = _ALONE,
    isolate: bool = False,
    decoders: Decoders | None = None,
) -> ShardStats:
    """Scores every image of a shard and writes its rows. A bad image becomes a row with status error.

    If the thresholds follow from the run's scores, masks are left to mask_shard.

    Args:
        shard: the images.
        run: the run that the shard belongs to.
        detector: scores the images.
        prompts: the embeddings of each class of the shard.
        source: the store of the images.
        output: the store of the results.
        threads: number of threads that read and decode, and of threads that write.
        turn: a lock on the model, held from the first batch to the last. Of several shards in one process, one has the
            model while others read ahead or write their last masks.
        guard: entered around each decoding, unless `isolate` is set.
        isolate: decode in another process, so that an image that kills its decoder costs only its own row. Used after a
            worker has died over this shard.
        decoders: decode photos in other processes, too; None: here alone.

    Raises OSError where the output cannot be written, StoreError where a store cannot be used.
    """
    job, thresholds = run.job, fixed_thresholds(run.job)

    def start_batch(batch: _Batch) -> tuple[_Batch, Pending, dict[str, PromptEmbeddings]]:
        known = {name: prompts[name] for name in dict.fromkeys(image["class_name"] for image, _ in batch)}
        good = [(known[image["class_name"]], item) for image, item in batch if isinstance(item, Decoded)]
        return batch, start(detector, [item for _, item in good], [of_class for of_class, _ in good], job), known

    def finish(row: Row) -> Row:
        return row if thresholds is None or row["status"] == "error" else mask(row, thresholds)

    def mask(row: Row, thresholds: Thresholds) -> Row:
        return write_mask(row, thresholds, run.version, run, output)

    images = (row for batch in shard.images.to_batches(max_chunksize=job.model.batch_size) for row in batch.to_pylist())
    read_threads = 1 if isolate else threads  # the worker may have died for lack of memory
    size = batch_size(job)
    with (
        Isolation() if isolate else contextlib.nullcontext() as isolation,
        ThreadPoolExecutor(read_threads if decoders is None else decoders.places, "read") as readers,
        ThreadPoolExecutor(1, "model") as model,
        ThreadPoolExecutor(threads, "write") as writers,
    ):
        reader = PhotoReader(run, View.of(detector), source, output, guard=guard, isolation=isolation)
        decoded = batches(_read_ahead(images, reader, readers, size, decoders), size)
        note = None if decoders is None else decoders.note
        with contextlib.closing(_take_turn(turn, model, decoded, note)) as ours:
            scored = (
                row
                for batch, detections, known in map_ahead(model, start_batch, ours, ahead=2)
                for row in _new_rows(batch, detections(), shard.shard_id, run, known)
            )
            rows = list(map_ahead(writers, finish, scored, ahead=2 * size))
    return _commit(rows, run.shards, shard.shard_id, output)


def mask_shard(
    shard_id: str, digest: str, thresholds: Mapping[str, Thresholds], run: Run, output: Store, threads: int
) -> ShardStats:
    """Writes the masks of a scored shard, for thresholds that follow from the run's scores.

    The rows with their masks are written below paths.masked_shards(run_id, digest). digest: of the thresholds; it is
    part of the masks' keys.
    """
    version = paths.mask_version(run.run_id, digest)

    def finish(row: Row) -> Row:
        if row["status"] == "error":
            return row
        return write_mask(row, thresholds[row["class_name"]], version, run, output)

    rows = read_shard(output, run.shards, shard_id).to_pylist()
    with ThreadPoolExecutor(threads, "write") as writers:
        finished = list(map_ahead(writers, finish, rows, ahead=2 * threads))
    return _commit(finished, paths.masked_shards(run.run_id, digest), shard_id, output)


def write_mask(row: Row, thresholds: Thresholds, version: str, run: Run, output: Store) -> Row:
    """Writes the mask of a scored row, and its map if the job wants maps. Returns the row with verdict and regions.

    version: see paths.mask_key.
    """
    night, class_name, image_key = run.job.run_date, row["class_name"], row["image_key"]
    width, height = row["width"], row["height"]
    grid = np.asarray(row["grid"], dtype=np.float32).reshape(-1, row["grid_width"])
    names = row["defect_names"]
    defect_width = row["defect_grid_width"] or row["grid_width"]
    defect_grid = np.asarray(row["defect_grid"], dtype=np.float32)
    defect_grid = defect_grid.reshape(len(names), defect_grid.size // (max(1, len(names)) * defect_width), defect_width)
    map_png = None
    with PIXELS.hold(width * height):
        if (grid >= thresholds.mask).any():
            mask = draw_mask(grid, width, height, thresholds.mask)
            area, mask_png = mask.share, encode_mask(mask)
            regions = [vars(region) for region in find_regions(mask, names, defect_grid, *_peers(row))]
            del mask
        else:  # the map is interpolated, so it never exceeds the patches
            area, mask_png, regions = 0.0, encode_empty_mask(width, height), []
        if run.job.output.maps:
            map_png = encode_map(upsample(grid, width, height))
    mask_key = paths.mask_key(night, version, class_name, image_key)
    output.write(mask_key, mask_png)
    map_key = paths.map_key(night, version, class_name, image_key) if map_png is not None else None
    if map_key is not None and map_png is not None:
        output.write(map_key, map_png)
    return {
        **row,
        "threshold": thresholds.score,
        "mask_threshold": thresholds.mask,
        "threshold_source": run.job.threshold.source,
        "is_anomalous": row["score"] >= thresholds.score,
        "mask_uri": output.uri(mask_key),
        "map_uri": None if map_key is None else output.uri(map_key),
        "mask_area": area,
        "regions": regions,
    }


def _peers(row: Row) -> tuple[Sequence[str], NDArray[np.int16] | None]:
    """Returns the addresses of a row's peers, and which of them is most similar at each patch [gh, gw], or None."""
    if row["peer_grid"] is None:
        return (), None
    return row["peer_uris"], np.asarray(row["peer_grid"], dtype=np.int16).reshape(-1, row["grid_width"])


def _read_ahead(
    images: Iterator[Row], reader: PhotoReader, threads: ThreadPoolExecutor, size: int, decoders: Decoders | None
) -> Iterator[tuple[Row, Decoded | ImageError]]:
    """Yields each row with its decoded photo, in order. size: photos of a batch; two batches may wait."""
    if decoders is None:
        yield from map_ahead(threads, lambda image: (image, reader.read(image)), images, ahead=2 * size)
        return
    chunk = min(_CHUNK, size)
    share, ahead = decoders, decoders.places + 2 * -(-size // chunk)
    chunks = _one_after_another(batches(images, chunk), decoders.order)
    for rows in map_ahead(
        threads, lambda rows: list(zip(rows, share.decode(rows, reader.read), strict=True)), chunks, ahead=ahead
    ):
        yield from rows


def _one_after_another(chunks: Iterator[list[Row]], order: _Context) -> Iterator[list[Row]]:
    """Yields the chunks of a shard when the shard before, which needs the model first, has none left."""
    with order:
        yield from chunks


def _take_turn(
    turn: _Context,
    model: ThreadPoolExecutor,
    decoded: Iterator[_Batch],
    note: Callable[[float, int], None] | None,
) -> Generator[_Batch, None, None]:
    """Yields the batches while holding `turn`.

    The first batch is decoded before the turn begins. The turn ends when the model's thread has started the last batch:
    a GPU then still computes it, and can be given the first batch of the next shard.

    note: is told how long each batch was waited for during the turn, and its length.
    """
    first = list(itertools.islice(decoded, 1))
    with turn:
        waiting = itertools.chain(first, decoded)
        yield from waiting if note is None else _timed(waiting, note)
        model.submit(lambda: None).result()


def _timed(waiting: Iterator[_Batch], note: Callable[[float, int], None]) -> Iterator[_Batch]:
    while True:
        asked = time.monotonic()
        batch = next(waiting, None)
        if batch is None:
            return
        note(time.monotonic() - asked, len(batch))
        yield batch


def _new_rows(
    batch: _Batch, detections: Sequence[Detection], shard_id: str, run: Run, prompts: Mapping[str, PromptEmbeddings]
) -> Iterator[Row]:
    """Yields the rows of a batch. detections: those of the images that could be decoded, in their order."""
    waiting = iter(detections)
    for image, item in batch:
        row = _new_row(image, shard_id, run, prompts[image["class_name"]])
        if isinstance(item, ImageError):
            yield {**row, **_failure(item)}
            continue
        detection = next(waiting)
        row |= {"width": item.source_width, "height": item.source_height}
        row |= {"bit_depth": item.bit_depth, "clipped": item.clipped, "frames": item.frames}
        row["tiles"] = 1 if item.tiles is None else len(item.tiles)
        if not (np.isfinite(detection.score) and np.isfinite(detection.grid).all()):
            message = f"{run.model} gave a score that is not a number; check the weights and model.precision"
            yield {**row, **_failure(ImageError(ErrorType.INTERNAL, message))}
            continue
        yield {**row, **_outcome(detection, prompts[image["class_name"]])}


def _new_row(image: Row, shard_id: str, run: Run, prompts: PromptEmbeddings) -> Row:
    return {
        "class_name": image["class_name"],
        "image_key": image["key"],
        "image_id": image["image_id"],
        "image_uri": image["uri"],
        "image_etag": image["etag"],
        "run_id": run.run_id,
        "shard_id": shard_id,
        "prompt_source": prompts.ensemble.source,
        "prompt_fingerprint": prompts.ensemble.fingerprint,
        "model": run.model,
        "weights_sha256": run.weights_sha256,
        "scored_at": datetime.now(timezone.utc),
    }


def _failure(error: ImageError) -> Row:
    return {"status": "error", "error_type": error.error_type.value, "error_message": redact(error.message)}


def _outcome(detection: Detection, prompts: PromptEmbeddings) -> Row:
    return {
        "status": "ok",
        "score": detection.score,
        "score_global": detection.score_global,
        "score_local": detection.score_local,
        "score_reference": detection.score_reference,
        "shots": detection.shots,
        "score_peers": detection.score_peers,
        "peers": detection.peers,
        "peers_earlier": prompts.peers.earlier if prompts.peers else 0,
        "peer_uris": list(prompts.peers.uris) if prompts.peers else None,
        "peer_grid": None if detection.nearest_peer is None else detection.nearest_peer.ravel(),
        "map_peak": detection.grid.max(),
        "explanation": [vars(evidence) for evidence in detection.explanation],
        "prompts_kept_normal": detection.kept_normal,
        "prompts_kept_anomalous": detection.kept_anomalous,
        "prompts_kept": detection.kept,
        "grid": detection.grid.ravel(),
        "grid_width": detection.grid.shape[1],
        "defect_names": list(prompts.defects),
        "defect_grid": detection.defect_grid.ravel(),
        "defect_grid_width": detection.defect_grid.shape[2],
    }


def _commit(rows: list[Row], folder: str, shard_id: str, output: Store) -> ShardStats:
    output.write(paths.shard_key(folder, shard_id), encode_shard(pa.Table.from_pylist(rows, schema=SHARD)))
    return ShardStats(
        shard_id,
        len(rows),
        errors=Counter(row["error_type"] for row in rows if row["status"] == "error"),
        anomalies=Counter(row["class_name"] for row in rows if row.get("is_anomalous")),
        clipped=sum(bool(row.get("clipped")) for row in rows),
    )
