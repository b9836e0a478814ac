"""Computes ROC, precision-recall and PRO from counts per threshold: exactly for distinct values, with bounds for bins.

A curve is known exactly at the edges of bins, and rises monotonically between them. So the exact area lies between the
two staircases through the known points. `Measure.error` is the largest distance of the value from these two bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma

Points: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """A metric, 0 to 1. Its exact value lies between value - error and value + error, and error is 0 without bins."""

    value: float
    error: float


@dataclass(frozen=True, eq=False)
class Counts:
    """Number of normal and anomalous items with each value (or in each bin), by rising value: [N], int64."""

    normal: NDArray[np.int64]
    anomalous: NDArray[np.int64]

    @property
    def has_both(self) -> bool:
        """Whether there are normal and anomalous items; otherwise no metric exists."""
        return bool(self.normal.any() and self.anomalous.any())


def count_values(scores: NDArray[np.floating], anomalous: NDArray[np.bool_]) -> Counts:
    """Counts the items with each distinct score. scores: [n]; anomalous: [n]. Curves from such counts are exact."""
    values, places = np.unique(scores, return_inverse=True)
    size = len(values)
    return Counts(np.bincount(places[~anomalous], minlength=size), np.bincount(places[anomalous], minlength=size))


def rates(counts: NDArray[np.number]) -> Points:
    """Returns the share of items at or above each value, from the highest value down: [N + 1], rising from 0 to 1."""
    above: Points = np.concatenate([[0.0], np.cumsum(counts[::-1], dtype=np.float64)])
    return above / float(above[-1])


def auroc(counts: Counts) -> Measure | None:
    """Returns the area under the ROC curve; None if either side is empty."""
    return area(rates(counts.normal), rates(counts.anomalous)) if counts.has_both else None


def area(x: Points, y: Points, limit: float = 1.0) -> Measure:
    """Returns the area under a rising curve up to x = limit, divided by the limit, by trapezoids. x, y: [K]."""
    width, rise = np.diff(x), np.diff(y)
    inside = np.clip((limit - x[:-1]) / np.where(width > 0, width, 1.0), 0.0, 1.0)
    width = np.where(width > 0, width * inside, 0.0)
    value = float(width @ (y[:-1] + rise * inside / 2))
    low, high = float(width @ y[:-1]), float(width @ y[1:])
    return Measure(value / limit, max(high - value, value - low) / limit)


def average_precision(counts: Counts) -> Measure | None:
    """Returns the sum over thresholds of recall gained x precision, as scikit-learn does; None if either side is empty.

    Bounds within a bin: at best, all anomalous items of the bin rank above its normal ones and share one score. At
    worst, all normal items rank above the anomalous ones, whose scores differ.
    """
    if not counts.has_both:
        return None
    anomalous, normal = counts.anomalous[::-1].astype(np.float64), counts.normal[::-1].astype(np.float64)
    tp, fp = np.cumsum(anomalous), np.cumsum(normal)
    hit = anomalous > 0
    anomalous, normal, tp, fp = anomalous[hit], normal[hit], tp[hit], fp[hit]
    total = float(tp[-1])
    value = float(anomalous @ (tp / (tp + fp))) / total
    high = float(anomalous @ (tp / (tp + fp - normal))) / total
    # sum over j = 1..a of (c + j) / (c + j + fp) = a - fp (H(c + a + fp) - H(c + fp)), by digamma.
    before = tp - anomalous
    low = float((anomalous - fp * (digamma(tp + fp + 1) - digamma(before + fp + 1))).sum()) / total
    return Measure(value, max(high - value, value - low))


def f1_max(counts: Counts) -> Measure | None:
    """Returns the highest F1 over all thresholds; None if either side is empty."""
    if not counts.has_both:
        return None
    tp, fp = np.cumsum(counts.anomalous[::-1]), np.cumsum(counts.normal[::-1])
    total = tp[-1]
    value = float((2 * tp / (tp + fp + total)).max())
    high = float((2 * tp / (tp + fp - counts.normal[::-1] + total)).max())
    return Measure(value, high - value)
