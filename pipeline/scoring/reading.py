"""Reads and decodes the photos of a manifest, as a run's model sees them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from pipeline.images import FILE_BYTES, Decoded, ImageError, Isolation
from pipeline.scoring.batches import View, read_image, view_decoder
from pipeline.scoring.spans import RunSpans, Spans
from pipeline.storage import Run, Store
from schemas.job import JobConfig
from schemas.tables import ErrorType

Row = dict[str, Any]
"""A row of the manifest."""

_MAX_BYTES_PER_PIXEL = 8
"""Bytes per pixel of uncompressed RGBA of 16 bits."""
_MAX_METADATA_BYTES = 16_000_000


class PhotoDecoder:
    """Decodes the bytes of photos, deep ones with the span of their class. Safe for use by several threads."""

    def __init__(
        self,
        job: JobConfig,
        view: View,
        spans: Spans,
        *,
        guard: contextlib.AbstractContextManager[Any] | None = None,
        isolation: Isolation | None = None,
    ) -> None:
        """guard: entered around each decoding here. isolation: decodes in another process; then use one thread."""
        self._decoder = view_decoder(job, view, isolation)
        self._spans = spans
        self._guard = contextlib.nullcontext() if guard is None or isolation else guard

    def decode(self, class_name: str, data: bytes) -> Decoded:
        """Decodes a photo of a class. Raises ImageError where the photo is at fault, StoreError as Spans.of does."""
        with self._guard:
            return self._decoder(data, span=self._spans.of(class_name, data))


class PhotoReader:
    """Reads and decodes photos of a run. Safe for use by several threads."""

    def __init__(
        self,
        run: Run,
        view: View,
        source: Store,
        output: Store,
        *,
        guard: contextlib.AbstractContextManager[Any] | None = None,
        isolation: Isolation | None = None,
    ) -> None:
        """guard, isolation: as PhotoDecoder takes them."""
        self._source = source
        spans = RunSpans(run.job, run.run_id, source, output, isolation)
        self._decoder = PhotoDecoder(run.job, view, spans, guard=guard, isolation=isolation)
        self._max_pixels = run.job.dataset.max_pixels

    def read(self, image: Row) -> Decoded | ImageError:
        """Reads and decodes the photo of a row. Returns an ImageError where the photo is at fault.

        Raises StoreError where a store as a whole cannot be used.
        """
        size = image["size"] or 0
        if size > _MAX_BYTES_PER_PIXEL * self._max_pixels + _MAX_METADATA_BYTES:
            message = f"its file has {size} bytes, more than dataset.max_pixels ({self._max_pixels}) can need"
            return ImageError(ErrorType.TOO_MANY_PIXELS, message)
        with FILE_BYTES.hold(size):
            return read_image(image["uri"], self._source, partial(self._decoder.decode, image["class_name"]))


class Decoders(Protocol):
    """Shares the decoding of photos between this process and others."""

    @property
    def order(self) -> contextlib.AbstractContextManager[Any]:
        """A lock that a shard holds until it has handed over its last photos. So shards do not take turns in decoding,
        and the one that has the model need not wait."""

    @property
    def places(self) -> int:
        """The number of calls of decode that can work at the same time."""

    def decode(
        self, images: Sequence[Row], here: Callable[[Row], Decoded | ImageError]
    ) -> Sequence[Decoded | ImageError]:
        """Returns the decoded photos of some rows, in their order. Waits until one of the places is free.

        here: reads and decodes a photo in this process.
        """

    def note(self, seconds: float, images: int) -> None:
        """Takes note that the model has waited so long for the pixels of a batch of so many images."""
