"""Computes pixel metrics in one pass and bounded memory, from mergeable histograms of map values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.evaluation.curves import Counts, Measure, Points, area, auroc, average_precision, f1_max, rates

PRO_LIMIT = 0.3
"""False positive rate up to which PRO is integrated; papers use the same."""

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=np.int8)


@dataclass(frozen=True)
class Bins:
    """Bins of equal width from low to high.

    Values outside fall into the first or the last bin, which only adds error.
    """

    low: float
    high: float
    count: int = 1 << 16

    def of(self, values: NDArray[np.float32]) -> NDArray[np.intp]:
        """Returns the bin of each value. Rounding keeps the order of values, so the error bounds stay valid."""
        scale = self.count / (self.high - self.low) if self.high > self.low else 0.0
        return ((values - np.float32(self.low)) * np.float32(scale)).clip(0, self.count - 1).astype(np.intp)


def label_regions(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Numbers the connected regions (8 neighbours) of a ground truth [h, w] from 1; normal pixels get 0."""
    labels, _ = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)
    return np.asarray(labels, dtype=np.int32)


class PixelHistogram:
    """Counts the pixels of any number of images in bins, as pixel metrics need them. `+` merges two with equal bins.

    counts: normal and anomalous pixels per bin. overlap: per bin, the sum over regions of the share of the region's
    pixels in the bin.
    """

    def __init__(self, bins: Bins) -> None:
        self.bins = bins
        self.counts = Counts(np.zeros(bins.count, dtype=np.int64), np.zeros(bins.count, dtype=np.int64))
        self.overlap = np.zeros(bins.count)
        self.regions = 0

    def add(self, anomaly_map: NDArray[np.float32], regions: NDArray[np.int32]) -> None:
        """Counts the pixels of an image. anomaly_map: [h, w]; regions: [h, w], see label_regions."""
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
        """Merges two histograms. Raises ValueError where their bins differ."""
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
        """Computes pixel_auroc, pixel_aupr, pixel_f1_max and pixel_pro; None if there are only pixels of one kind."""
        return {
            "pixel_auroc": auroc(self.counts),
            "pixel_aupr": average_precision(self.counts),
            "pixel_f1_max": f1_max(self.counts),
            "pixel_pro": area(*self.pro_curve(), PRO_LIMIT) if self.counts.has_both else None,
        }

    def roc_curve(self) -> tuple[Points, Points]:
        """Returns the false and true positive rates of pixels, [bins + 1] each. Needs pixels of both kinds."""
        return rates(self.counts.normal), rates(self.counts.anomalous)

    def pro_curve(self) -> tuple[Points, Points]:
        """Returns the false positive rates of pixels, and the mean share of a region that is found, [bins + 1] each."""
        return rates(self.counts.normal), rates(self.overlap)
