"""Decides, once per class, which values become black and white in photos of more than 8 bits.

It is not decided for each photo, because dark parts would then be brightened differently in each.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.images import (
    Extremes,
    ImageError,
    Isolation,
    Span,
    choose_span,
    depth_span,
    may_be_deep,
    measure_image,
)
from pipeline.scoring.batches import read_image
from pipeline.scoring.choice import LowestIds
from pipeline.storage import Store, paths
from schemas.job import JobConfig

_T = TypeVar("_T")

Samples = Mapping[str, Sequence[str]]
"""Addresses, by class, of the photos from which the span of the class is decided."""

Earlier = Mapping[str, tuple[float, float]]
"""The span of each class in its latest night."""

SAMPLE_COLUMNS = ("uri", "key", "class_name", "image_id")
"""The columns of the manifest that choose_samples needs."""

_SAMPLE_SIZE = 16
"""Number of photos per class in a sample."""

_EIGHT_BIT_NAMES = r"(?i)\.(jpg|jpeg|jpe|jfif|mpo|bmp|webp|gif|avif|heic|heif)$"
"""Matches names of photos that have 8 bits, or whose decoders return 8 bits."""


def choose_samples(batches: Iterable[pa.RecordBatch]) -> Samples:
    """Chooses a sample of each class, among the photos whose names allow more than 8 bits.

    Ids are hashes, so those with the lowest ids are spread over the class. batches: manifest rows with
    SAMPLE_COLUMNS; memory holds one batch at a time.
    """
    lowest = LowestIds(_SAMPLE_SIZE)
    for batch in batches:
        lowest.add(batch.filter(pc.invert(pc.match_substring_regex(batch.column("key"), _EIGHT_BIT_NAMES))))
    return {name: [row["uri"] for row in rows] for name, rows in lowest.rows.items()}


def sample_photos(photos: Iterable[tuple[str, str]]) -> Samples:
    """Chooses a sample of each class from a list: every n-th photo. photos: class and address of each."""
    found: dict[str, list[str]] = {}
    for name, uri in photos:
        found.setdefault(name, []).append(uri)
    return {name: spread(uris) for name, uris in found.items()}


def spread(photos: Sequence[_T]) -> Sequence[_T]:
    """Chooses the photos of a class that decide, from all over it."""
    return photos[:: max(1, len(photos) // _SAMPLE_SIZE)][:_SAMPLE_SIZE]


class Spans:
    """The span of each class, decided when its first deep photo is met. Safe for use by several threads."""

    def __init__(self, job: JobConfig, source: Store, samples: Samples, isolation: Isolation | None = None) -> None:
        """isolation: measures photos in another process; None: in this one."""
        self._fixed = None if job.dataset.bit_depth is None else depth_span(job.dataset.bit_depth)
        self._source = source
        self._samples = samples
        self._measure = functools.partial(
            measure_image if isolation is None else isolation.measure, max_pixels=job.dataset.max_pixels
        )
        self._known: dict[str, Span] = {}
        self._lock = threading.Lock()

    def of(self, class_name: str, data: bytes) -> Span | None:
        """Returns the span with which to decode a photo of the class; None if it has 8 bits. Raises StoreError."""
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
        """Decides the span from the sample; from this photo (`own`) if the sample holds no deep photo."""
        sampled = (read_image(uri, self._source, self._measure) for uri in self._samples.get(class_name, ()))
        return choose_span([item for item in sampled if isinstance(item, Extremes)] or [own])


class RunSpans(Spans):
    """The spans of a run, kept in its folder: the process that decides first decides for all."""

    def __init__(
        self, job: JobConfig, run_id: str, source: Store, output: Store, isolation: Isolation | None = None
    ) -> None:
        super().__init__(job, source, {}, isolation)
        self._run_id = run_id
        self._output = output
        self._earlier: Earlier = {}

    def _obtain(self, class_name: str, own: Extremes) -> Span:
        if (kept := _read_span(self._run_id, class_name, self._output)) is not None:
            return kept
        if not self._samples:
            self._samples, self._earlier = _read_samples(self._run_id, self._output)
        key = paths.span_key(self._run_id, class_name)
        self._output.create(key, json.dumps(self._decide(class_name, own)).encode())
        kept = _read_span(self._run_id, class_name, self._output)
        assert kept is not None, key
        return kept

    def _decide(self, class_name: str, own: Extremes) -> Span:
        """A depth grows where tonight's sample exceeds that of earlier nights; a range of fractions stays, as it would
        be another every night."""
        if class_name not in self._earlier:
            return super()._decide(class_name, own)
        earlier = Span(*self._earlier[class_name])
        if earlier.bits is None:
            return earlier
        return choose_span([super()._decide(class_name, own).extremes, earlier.extremes])


def _read_span(run_id: str, class_name: str, output: Store) -> Span | None:
    """Reads the span that a run has chosen for a class; None if no photo has needed one."""
    try:
        return Span(*json.loads(output.read(paths.span_key(run_id, class_name))))
    except FileNotFoundError:
        return None


def read_spans(run_id: str, classes: Iterable[str], output: Store) -> dict[str, Span]:
    """Reads the spans that a run has chosen, by class; a class whose photos need none is left out."""
    there = {info.key for info in output.list(paths.run_key(run_id, "spans"))}
    found = {name: _read_span(run_id, name, output) for name in classes if paths.span_key(run_id, name) in there}
    return {name: span for name, span in found.items() if span is not None}


def write_samples(run_id: str, samples: Samples, earlier: Earlier, output: Store) -> None:
    """Stores the samples, and the spans of earlier nights, in the run's folder, so that nothing later changes them."""
    if samples:
        output.create(paths.run_key(run_id, "samples.json"), json.dumps([samples, earlier]).encode())


def _read_samples(run_id: str, output: Store) -> tuple[Samples, Earlier]:
    """Reads what write_samples has stored; empty if there is nothing."""
    try:
        samples, earlier = json.loads(output.read(paths.run_key(run_id, "samples.json")))
    except FileNotFoundError:
        return {}, {}
    return samples, earlier
