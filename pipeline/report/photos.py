"""Reads thumbnails for the gallery. A photo that cannot be read never fails or delays a report."""

from __future__ import annotations

from pipeline.images import ImageError, Span, decode_thumbnail
from pipeline.storage import Store, redact

LONGEST = 360
"""Pixels of a thumbnail's longer side."""


class Photos:
    """Reads photos until their store fails. All further photos then get the same fault, without another attempt."""

    def __init__(self, source: Store, max_pixels: int) -> None:
        self._source = source
        self._max_pixels = max_pixels
        self._outage: str | None = None

    def thumbnail(self, uri: str, span: Span | None) -> tuple[bytes | None, str | None]:
        """Returns a JPEG, or None and the reason. span: of its class. May be called by several threads."""
        if self._outage is not None:
            return None, self._outage
        try:
            data = self._source.read_uri(uri)
            return decode_thumbnail(data, longest=LONGEST, max_pixels=self._max_pixels, span=span), None
        except FileNotFoundError:
            return None, "the photo is no longer there"
        except ImageError as error:
            return None, f"the photo has changed since it was scored: {redact(error.message)}"
        except PermissionError as error:
            return None, f"the photo may not be read: {redact(str(error))}"
        except OSError as error:  # it was retried; every other photo would take as long
            self._outage = f"photos could not be read: {redact(str(error))}"
            return None, self._outage
