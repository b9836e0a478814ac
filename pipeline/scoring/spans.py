"""One depth a class: which values become black and white in its photos of more than 8 bits.

A photo of its own would not do: dark parts would be brightened differently in each.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.images import (
    Extremes,
    ImageError,
    Span,
    choose_span,
    depth_span,
    may_be_deep,
    measure_image,
    measure_isolated,
)
from pipeline.scoring.batches import read_image
from pipeline.scoring.choice import LowestIds
from pipeline.storage import Store, paths
from schemas.job import JobConfig

Samples = Mapping[str, Sequence[str]]
"""By class, addresses of the photos that decide."""

SAMPLED = ("uri", "key", "class_name", "image_id")
"""Columns of the manifest that samples are chosen by."""

_SAMPLE = 16
"""Photos of a class that decide."""

_EIGHT_BITS = r"(?i)\.(jpg|jpeg|jpe|jfif|mpo|bmp|webp|gif|avif|heic|heif)$"
"""Names of photos that have 8 bits, or come as such from their decoders."""


def choose_samples(batches: Iterable[pa.RecordBatch]) -> Samples:
    """Of each class, of its photos that may be deep by their names, those whose id is lowest: ids are hashes, so they
    are spread over the class. batches: manifest rows with class_name, image_id, uri and key; memory is that of one."""
    lowest = LowestIds(_SAMPLE)
    for batch in batches:
        lowest.add(batch.filter(pc.invert(pc.match_substring_regex(batch.column("key"), _EIGHT_BITS))))
    return {name: [row["uri"] for row in rows] for name, rows in lowest.rows.items()}


def sample_photos(photos: Iterable[tuple[str, str]]) -> Samples:
    """As choose_samples, of photos that are in memory: classes and addresses."""
    found: dict[str, list[str]] = {}
    for name, uri in photos:
        found.setdefault(name, []).append(uri)
    return {name: uris[:: max(1, len(uris) // _SAMPLE)][:_SAMPLE] for name, uris in found.items()}


class Spans:
    """The span of each class, decided when its first deep photo is met. For use by threads."""

    def __init__(self, job: JobConfig, source: Store, samples: Samples, *, isolate: bool = False) -> None:
        """isolate: measure each photo in a process of its own."""
        self._fixed = None if job.dataset.bit_depth is None else depth_span(job.dataset.bit_depth)
        self._source = source
        self._samples = samples
        self._measure = functools.partial(
            measure_isolated if isolate else measure_image, max_pixels=job.dataset.max_pixels
        )
        self._known: dict[str, Span] = {}
        self._lock = threading.Lock()

    def of(self, class_name: str, data: bytes) -> Span | None:
        """What a photo of the class is to be decoded with; None where it needs none. Raises StoreError."""
        if not may_be_deep(data):
            return None
        if self._fixed is not None:
            return self._fixed
        if class_name not in self._known:
            try:
                own = self._measure(data)
            except ImageError:
                return None
            if own is None:
                return None
            with self._lock:
                if class_name not in self._known:
                    self._known[class_name] = self._obtain(class_name, own)
        return self._known[class_name]

    def _obtain(self, class_name: str, own: Extremes) -> Span:
        return self._decide(class_name, own)

    def _decide(self, class_name: str, own: Extremes) -> Span:
        """By the sample; by a photo itself where that holds no deep one."""
        sampled = (read_image(uri, self._source, self._measure) for uri in self._samples.get(class_name, ()))
        return choose_span([item for item in sampled if isinstance(item, Extremes)] or [own])


class RunSpans(Spans):
    """Those of a run: kept in its folder, where whoever decides first decides for all."""

    def __init__(self, job: JobConfig, run_id: str, source: Store, output: Store, *, isolate: bool = False) -> None:
        super().__init__(job, source, {}, isolate=isolate)
        self._run_id = run_id
        self._output = output

    def _obtain(self, class_name: str, own: Extremes) -> Span:
        key = paths.span_key(self._run_id, class_name)
        try:
            return Span(*json.loads(self._output.read(key)))
        except FileNotFoundError:
            self._samples = self._samples or read_samples(self._run_id, self._output)
            span = self._decide(class_name, own)
        if not self._output.create(key, json.dumps(span).encode()):
            return Span(*json.loads(self._output.read(key)))
        return span


def write_samples(run_id: str, samples: Samples, output: Store) -> None:
    """Keeps the choice with the run: photos that arrive later do not change it."""
    if samples:
        output.create(paths.run_key(run_id, "samples.json"), json.dumps(samples).encode())


def read_samples(run_id: str, output: Store) -> Samples:
    """What write_samples has kept; nothing where there was nothing."""
    try:
        samples: Samples = json.loads(output.read(paths.run_key(run_id, "samples.json")))
    except FileNotFoundError:
        return {}
    return samples
