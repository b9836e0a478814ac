"""Pixel metrics in bounded memory: histograms of map values, one pass, mergeable."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.evaluation.curves import Counts, Measure, Points, area, auroc, average_precision, f1_max, rates

PRO_LIMIT = 0.3
"""False positive rate up to which PRO is integrated, as papers do."""

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=np.int8)


@dataclass(frozen=True)
class Bins:
    """Equal bins from low to high; values outside fall into the end bins, which widens errors but hides nothing."""

    low: float
    high: float
    count: int = 1 << 16

    def of(self, values: NDArray[np.float32]) -> NDArray[np.intp]:
        """The bin of each value. Rounding keeps the order of values, which is all that the error bound needs."""
        scale = self.count / (self.high - self.low) if self.high > self.low else 0.0
        return ((values - np.float32(self.low)) * np.float32(scale)).clip(0, self.count - 1).astype(np.intp)


def label_regions(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Ground truth [h, w] -> the number of each pixel's connected region (8 neighbours), from 1; 0 is normal."""
    labels, _ = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)
    return np.asarray(labels, dtype=np.int32)


class PixelHistogram:
    """What pixel metrics need of any number of images: three numbers a bin. `+` merges parts of the same bins.

    counts: normal and anomalous pixels. overlap: sum over regions of the share of the region's pixels in the bin.
    """

    def __init__(self, bins: Bins) -> None:
        self.bins = bins
        self.counts = Counts(np.zeros(bins.count, dtype=np.int64), np.zeros(bins.count, dtype=np.int64))
        self.overlap = np.zeros(bins.count)
        self.regions = 0

    def add(self, anomaly_map: NDArray[np.float32], regions: NDArray[np.int32]) -> None:
        """Counts an image: its map [h, w] against its labelled regions [h, w]."""
        places = self.bins.of(anomaly_map).ravel()
        everything = np.bincount(places, minlength=self.bins.count)
        inside = np.flatnonzero(regions)
        if not len(inside):
            self.counts.normal[:] += everything
            return
        numbers, places = regions.ravel()[inside], places[inside]
        anomalous = np.bincount(places, minlength=self.bins.count)
        self.counts.anomalous[:] += anomalous
        self.counts.normal[:] += everything - anomalous
        areas = np.bincount(numbers)
        self.overlap += np.bincount(places, 1 / areas[numbers], minlength=self.bins.count)
        self.regions += len(areas) - 1

    def __add__(self, other: PixelHistogram) -> PixelHistogram:
        """Both together. Raises ValueError where their bins differ."""
        if self.bins != other.bins:
            raise ValueError(f"histograms of different bins cannot be merged: {self.bins} and {other.bins}")
        merged = PixelHistogram(self.bins)
        for part in (self, other):
            merged.counts.normal[:] += part.counts.normal
            merged.counts.anomalous[:] += part.counts.anomalous
            merged.overlap += part.overlap
            merged.regions += part.regions
        return merged

    def measure(self) -> dict[str, Measure | None]:
        """pixel_auroc, pixel_aupr, pixel_f1_max, pixel_pro; None where there are no normal or no anomalous pixels."""
        return {
            "pixel_auroc": auroc(self.counts),
            "pixel_aupr": average_precision(self.counts),
            "pixel_f1_max": f1_max(self.counts),
            "pixel_pro": area(*self.pro_curve(), PRO_LIMIT) if self.counts.has_both else None,
        }

    def roc_curve(self) -> tuple[Points, Points]:
        """False and true positive rates of pixels, [count + 1] each; only where there are pixels of both kinds."""
        return rates(self.counts.normal), rates(self.counts.anomalous)

    def pro_curve(self) -> tuple[Points, Points]:
        """False positive rate of pixels, and the mean share of a region that is found."""
        return rates(self.counts.normal), rates(self.overlap)
