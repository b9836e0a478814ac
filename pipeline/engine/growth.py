"""Decides how many decoders a scoring actor adds. It uses neither Ray nor a clock."""

from __future__ import annotations

_WAITS = 0.1
"""Share of the time from which a model counts as waiting for pixels."""

_GAIN = 0.1
"""Growth of the rate, as a share, that more decoders must bring; otherwise something else is the bottleneck."""


class Growth:
    """Watches how long a model waits for pixels, and says when decoders are added.

    Their number grows by half of all that decode, and only as long as that makes the night faster.
    """

    def __init__(self, now: float) -> None:
        self._since = now
        self._waited = 0.0
        self._images = 0
        self._decoders = 0
        self._before: tuple[int, float] | None = None

    def note(self, seconds: float, images: int) -> None:
        """Takes note that the model has waited so long for so many images."""
        self._waited += seconds
        self._images += images

    def more(self, now: float, cores: int, decoders: int) -> int:
        """Returns how many decoders to add, judged by what was noted since the last call.

        now: in seconds. cores: number that decode in the actor itself. decoders: number that work now. A time in which
        their number has changed is not judged.
        """
        since, self._since = self._since, now
        waited, self._waited = self._waited, 0.0
        images, self._images = self._images, 0
        known, self._decoders = self._decoders, decoders
        if now <= since or known != decoders or waited <= _WAITS * (now - since):
            return 0
        rate = images / (now - since)
        if self._before is not None:
            fewer, slower = self._before
            if decoders > fewer and rate < (1 + _GAIN) * slower:
                return 0
        self._before = decoders, rate
        return max(1, (cores + decoders) // 2)
