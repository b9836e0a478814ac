"""Scores labelled images under several configurations at once, in this process.

Every image is read and decoded once per model and tiling. Its features are computed once for all configurations that
differ only in prompts, adaptation or weighting.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.alfa import Detection, Detector, Encoder, Features, PromptEmbeddings, load_encoder, locate_weights
from pipeline.evaluation.measure import Configuration, LabelledImage, Score
from pipeline.images import GOOD, DatasetError, Decoded, ImageError
from pipeline.scoring import (
    Manifest,
    Neighbours,
    Spans,
    batch_size,
    batches,
    detect,
    image_decoder,
    make_memory,
    read_image,
    sample_photos,
    to_tensor,
)
from pipeline.storage import Store, map_ahead, paths, read_shard
from schemas.job import JobConfig
from schemas.prompts import PromptEnsemble
from schemas.text import one_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """A configuration to score with: its job, and for each class the prompts and the images to compare with."""

    name: str
    job: JobConfig
    ensembles: Mapping[str, PromptEnsemble]
    neighbours: Mapping[str, Neighbours]


@dataclass(frozen=True, eq=False)
class Scored:
    """Labelled images, and the scores of each configuration in the same order."""

    images: list[LabelledImage]
    configurations: list[Configuration]


def labelled_images(manifest: Manifest) -> list[LabelledImage]:
    """Returns the images of a manifest that have a label. Raises DatasetError if none has one."""
    rows = [row for batch in manifest.batches() for row in batch.to_pylist()]
    images = [_labelled(row) for row in rows if row["label"]]
    if not images:
        raise DatasetError(
            f"none of the {len(rows)} images has a label; layouts mvtec and visa have them, and a table needs a column "
            f"label (good, or the kind of defect), and mask_uri for pixel metrics"
        )
    if not any(image.is_good for image in images):
        found = ", ".join(sorted({one_line(image.label) for image in images})[:8])
        logger.warning("no image has the label %s, so all count as anomalous; the labels are %s", GOOD, found)
    if len(images) < len(rows):
        logger.warning("%d of %d images have no label and are left out", len(rows) - len(images), len(rows))
    return images


def score_variants(
    images: Sequence[LabelledImage],
    variants: Sequence[Variant],
    source: Store,
    threads: int,
    advance: Callable[[int], None],
) -> Scored:
    """Scores the images under all variants. advance: called with the number of images of each finished batch.

    Images that cannot be read, decoded or scored get None instead of a score, and a line in the log. Raises ModelError
    where a model does not support the options of a variant.
    """
    scores: dict[str, list[Score | None]] = {variant.name: [] for variant in variants}
    sizes: dict[int, tuple[int, int]] = {}
    for group in group_variants(variants):
        job = group[0].job
        spans = Spans(job, source, sample_photos((image.class_name, image.uri) for image in images))
        scorers = _make_scorers(load_encoder(job.model, locate_weights(job.model)), group, source, spans)
        decode = image_decoder(job, scorers[0].detector)

        def read(
            number: int, decode: Callable[..., Decoded] = decode, spans: Spans = spans
        ) -> tuple[int, Decoded | ImageError]:
            image = images[number]
            return number, read_image(
                image.uri, source, lambda data: decode(data, span=spans.of(image.class_name, data))
            )

        size = batch_size(job)
        with ThreadPoolExecutor(threads, "read") as readers:
            decoded = map_ahead(readers, read, range(len(images)), ahead=2 * size)
            for batch in batches(decoded, size):
                for number, item in batch:
                    if isinstance(item, ImageError):
                        logger.warning("%s is left out: %s", images[number].uri, item.message)
                    else:
                        sizes[number] = item.source_width, item.source_height
                _score_batch(batch, images, scorers, scores)
                advance(len(batch))
    found = [
        replace(image, width=sizes[number][0], height=sizes[number][1]) if number in sizes else image
        for number, image in enumerate(images)
    ]
    return Scored(found, [Configuration(variant.name, scores[variant.name]) for variant in variants])


def group_variants(variants: Sequence[Variant]) -> list[list[Variant]]:
    """Groups the variants that need the same pixels: those with the same model and tiling."""

    def view(variant: Variant) -> tuple[str, str]:
        return repr(variant.job.model), repr(variant.job.method.tile)

    return [list(group) for _, group in groupby(sorted(variants, key=view), key=view)]


@dataclass(frozen=True, eq=False)
class _Scorer:
    name: str
    job: JobConfig
    detector: Detector
    prompts: Mapping[str, PromptEmbeddings]


def _make_scorers(encoder: Encoder, variants: Sequence[Variant], source: Store, spans: Spans) -> list[_Scorer]:
    embedded: dict[tuple[str, str], PromptEmbeddings] = {}
    scorers = []
    for variant in variants:
        job = variant.job
        detector = Detector(encoder, job.resolved_method, job.references, job.peers)
        for name, ensemble in variant.ensembles.items():
            if (name, ensemble.fingerprint) not in embedded:
                embedded[name, ensemble.fingerprint] = detector.embed(ensemble)
        prompts = {name: embedded[name, item.fingerprint] for name, item in variant.ensembles.items()}
        for name, neighbours in variant.neighbours.items():
            stored = make_memory(prompts[name], neighbours, detector, job, source, spans)
            prompts[name] = replace(prompts[name], memory=stored.references, peers=stored.peers)
        scorers.append(_Scorer(variant.name, job, detector, prompts))
    return scorers


def _score_batch(
    batch: Sequence[tuple[int, Decoded | ImageError]],
    images: Sequence[LabelledImage],
    scorers: Sequence[_Scorer],
    scores: Mapping[str, list[Score | None]],
) -> None:
    good = [(number, item) for number, item in batch if isinstance(item, Decoded)]
    in_tiles = any(item.tiles is not None for _, item in good)
    pixels = to_tensor([item.pixels for _, item in good]) if good else None
    seen: dict[Any, Features] = {}
    for scorer in scorers:
        prompts = [scorer.prompts[images[number].class_name] for number, _ in good]
        detections: Iterator[Detection] = iter(())
        if in_tiles:
            detections = iter(detect(scorer.detector, [item for _, item in good], prompts, scorer.job))
        elif pixels is not None:
            key = scorer.detector.features_key
            if key not in seen:
                seen[key] = scorer.detector.features(pixels)
            detections = iter(scorer.detector.score_features(seen[key], prompts))
        for number, item in batch:
            scores[scorer.name].append(
                _score(next(detections), images[number].uri, scorer.name) if isinstance(item, Decoded) else None
            )


def _score(detection: Detection, uri: str, name: str) -> Score | None:
    if not (np.isfinite(detection.score) and np.isfinite(detection.grid).all()):
        logger.warning("%s is left out of %s: its score is not a number", uri, name)
        return None
    return Score(detection.score, detection.score_global, detection.score_local, detection.grid)


def read_run(output: Store, run_id: str, name: str) -> Scored:
    """Reads the labelled images of a finished run and their scores. name: of the configuration.

    Raises DatasetError if there are no labelled images, or some are not scored yet.
    """
    manifests = [info.key for info in output.list(paths.run_key(run_id, "").rstrip("/")) if _is_manifest(info.key)]
    truth: dict[str, LabelledImage] = {}
    for key in manifests:
        truth |= {
            row["image_id"]: _labelled(row)
            for row in pq.read_table(io.BytesIO(output.read(key))).to_pylist()
            if row["label"]
        }
    if not truth:
        where = output.uri(paths.run_key(run_id, "")).rstrip("/")
        raise DatasetError(f"no image of the run at {where} has a label; check the run's id")
    folder = paths.run_key(run_id, "shards")
    columns = ["image_id", "width", "height", "score", "score_global", "score_local", "grid", "grid_width"]
    scored: dict[str, tuple[LabelledImage, Score | None]] = {}
    for shard_id in sorted(paths.finished_shards(output, folder)):
        for row in read_shard(output, folder, shard_id, columns).to_pylist():
            if (image := truth.get(row["image_id"])) is not None:
                found = replace(image, width=row["width"], height=row["height"])
                scored[row["image_id"]] = found, _from_row(row)
    if len(scored) < len(truth):
        missing = len(truth) - len(scored)
        raise DatasetError(f"{missing} images of run {run_id} are not scored yet; finish the run with alfa score")
    images, scores = zip(*(scored[key] for key in truth), strict=True)
    return Scored(list(images), [Configuration(name, scores)])


def _is_manifest(key: str) -> bool:
    name = key.rpartition("/")[2]
    return name.startswith("manifest-") and name.endswith(".parquet") and key.count("/") == 2


def _labelled(row: Mapping[str, Any]) -> LabelledImage:
    return LabelledImage(row["uri"], row["key"], row["class_name"], row["label"], row["mask_uri"])


def _from_row(row: Mapping[str, Any]) -> Score | None:
    if row["score"] is None:
        return None
    grid = np.asarray(row["grid"], dtype=np.float32).reshape(-1, row["grid_width"])
    return Score(row["score"], row["score_global"], row["score_local"], grid)
