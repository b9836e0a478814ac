"""Measures scores against ground truth: metrics per class, per kind of defect, and their means over classes.

Image metrics are exact. Pixels are counted in histograms, one class at a time, so that memory does not depend on the
size of the images. Only the anomaly map of each image on the patch grid is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.curves import Measure, Points, auroc, average_precision, count_values, f1_max
from pipeline.evaluation.pixels import Bins, PixelHistogram, label_regions
from pipeline.images import GOOD, upsample
from pipeline.storage import StoreError, map_ahead
from schemas.text import one_line

logger = logging.getLogger(__name__)

IMAGE_METRICS = ("image_auroc", "image_aupr", "image_f1_max")
PIXEL_METRICS = ("pixel_auroc", "pixel_aupr", "pixel_f1_max", "pixel_pro")
METRICS = (*IMAGE_METRICS, *PIXEL_METRICS)
AT_THRESHOLD = ("false_positive_rate", "recall")
"""Metrics at the threshold of the job, if that is fixed: the shares of good and of anomalous images at or above it."""

_CURVE_POINTS = 400

Row = dict[str, Any]
Curve = tuple[Points, Points]
ReadMask = Callable[[str], NDArray[np.bool_]]


@dataclass(frozen=True)
class LabelledImage:
    """An image and its ground truth.

    label: good, or the kind of defect. width, height: in pixels; None where the image has no score.
    """

    uri: str
    key: str
    class_name: str
    label: str
    mask_uri: str | None
    width: int | None = None
    height: int | None = None

    @property
    def is_good(self) -> bool:
        """Whether the image has no defect."""
        return self.label == GOOD


@dataclass(frozen=True, eq=False)
class Score:
    """The result of a configuration for an image. grid: anomaly map on the patch grid [gh, gw], float32."""

    score: float
    score_global: float
    score_local: float
    grid: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Configuration:
    """The scores of a list of images under one configuration; None for an image that could not be scored."""

    name: str
    scores: Sequence[Score | None]


@dataclass(frozen=True, eq=False)
class Measured:
    """The result of measure().

    rows: in schema EVALUATION. rocs, pros: pixel curves by configuration and class, thinned for drawing.
    """

    rows: list[Row]
    rocs: dict[tuple[str, str], Curve] = field(default_factory=dict)
    pros: dict[tuple[str, str], Curve] = field(default_factory=dict)


def measure(
    images: Sequence[LabelledImage],
    configurations: Sequence[Configuration],
    read_mask: ReadMask,
    threads: int,
    threshold: float | None = None,
) -> Measured:
    """Computes the metrics of every configuration on the same images.

    Anomalous images whose mask is missing or cannot be read count for image metrics only; rows say how many there are.
    read_mask: returns the ground truth [h, w] at an address; called by threads. threshold: the threshold of scores, if
    all classes share one. Raises StoreError where a store cannot be used.
    """
    order = sorted(range(len(images)), key=lambda number: (images[number].class_name, images[number].label, number))
    measured = Measured([])
    per_class: dict[str, list[Row]] = {item.name: [] for item in configurations}
    for class_name, group in groupby(order, key=lambda number: images[number].class_name):
        numbers = list(group)
        histograms, unmasked = _count_pixels(images, numbers, configurations, read_mask, threads)
        labels = sorted({images[number].label for number in numbers} - {GOOD})
        for item in configurations:
            parts = histograms.get(item.name, {})
            whole = _merged(parts, (GOOD, *labels))
            row = _row(images, numbers, item, whole, unmasked, threshold)
            measured.rows.append({**row, "level": "class", "class_name": class_name})
            per_class[item.name].append(row)
            for label in labels:
                chosen = [number for number in numbers if images[number].label in (GOOD, label)]
                row = _row(images, chosen, item, _merged(parts, (GOOD, label)), unmasked, threshold)
                measured.rows.append({**row, "level": "defect", "class_name": class_name, "label": label})
            if whole is not None and whole.counts.has_both:
                measured.rocs[item.name, class_name] = _thin(whole.roc_curve())
                measured.pros[item.name, class_name] = _thin(whole.pro_curve())
        logger.info("measured %d images of class %s", len(numbers), one_line(class_name))
    measured.rows.extend(_mean(name, rows) for name, rows in per_class.items())
    return measured


def _row(
    images: Sequence[LabelledImage],
    numbers: Sequence[int],
    configuration: Configuration,
    histogram: PixelHistogram | None,
    unmasked: set[int],
    threshold: float | None,
) -> Row:
    scored = [number for number in numbers if configuration.scores[number] is not None]
    anomalous = np.array([not images[number].is_good for number in scored], dtype=bool)
    values = np.array([score.score for number in scored if (score := configuration.scores[number]) is not None])
    counts = count_values(values, anomalous)
    shares = dict.fromkeys(AT_THRESHOLD)
    if threshold is not None:
        sides = (values[~anomalous], values[anomalous])
        shares = {
            name: float((side >= threshold).mean()) if len(side) else None
            for name, side in zip(AT_THRESHOLD, sides, strict=True)
        }
    found: dict[str, Measure | None] = {
        "image_auroc": auroc(counts),
        "image_aupr": average_precision(counts),
        "image_f1_max": f1_max(counts),
        **(dict.fromkeys(PIXEL_METRICS) if histogram is None else histogram.measure()),
    }
    return {
        "configuration": configuration.name,
        "good": int((~anomalous).sum()),
        "anomalous": int(anomalous.sum()),
        "errors": len(numbers) - len(scored),
        "unmasked": len(unmasked.intersection(numbers)),
        **shares,
        **{name: None if item is None else item.value for name, item in found.items()},
        **{f"{name}_error": None if (item := found[name]) is None else item.error for name in PIXEL_METRICS},
    }


def _mean(name: str, rows: Sequence[Row]) -> Row:
    """Averages each metric over the classes that have it."""
    mean: Row = {"configuration": name, "level": "mean"}
    for count in ("good", "anomalous", "errors", "unmasked"):
        mean[count] = sum(row[count] for row in rows)
    for metric in (*METRICS, *AT_THRESHOLD, *(f"{metric}_error" for metric in PIXEL_METRICS)):
        values = [row[metric] for row in rows if row[metric] is not None]
        mean[metric] = float(np.mean(values)) if values else None
    return mean


def _count_pixels(
    images: Sequence[LabelledImage],
    numbers: Sequence[int],
    configurations: Sequence[Configuration],
    read_mask: ReadMask,
    threads: int,
) -> tuple[dict[str, dict[str, PixelHistogram]], set[int]]:
    """Counts the pixels of a class, by configuration and label. Also returns the anomalous images without a mask."""
    scored = [number for number in numbers if any(item.scores[number] is not None for item in configurations)]
    unmasked = {number for number in scored if not images[number].is_good and images[number].mask_uri is None}
    if not any(images[number].mask_uri for number in scored):
        return {}, unmasked
    bins = {item.name: _bins([score for number in scored if (score := item.scores[number])]) for item in configurations}
    histograms: dict[str, dict[str, PixelHistogram]] = {item.name: {} for item in configurations}
    with ThreadPoolExecutor(threads, "masks") as pool:
        wanted = (number for number in scored if number not in unmasked)
        read = map_ahead(pool, lambda number: (number, _regions(images[number], read_mask)), wanted, ahead=2 * threads)
        for number, regions in read:
            if regions is None:
                unmasked.add(number)
                continue
            height, width = regions.shape
            for item in configurations:
                score = item.scores[number]
                if score is None:
                    continue
                parts = histograms[item.name]
                label = images[number].label
                parts.setdefault(label, PixelHistogram(bins[item.name])).add(
                    upsample(score.grid, width, height), regions
                )
    return histograms, unmasked


def _bins(scores: Sequence[Score]) -> Bins:
    """Makes bins over the range of a class's maps, which interpolation between patches never leaves."""
    if not scores:
        return Bins(0.0, 1.0)
    return Bins(min(float(score.grid.min()) for score in scores), max(float(score.grid.max()) for score in scores))


def _regions(image: LabelledImage, read_mask: ReadMask) -> NDArray[np.int32] | None:
    if image.is_good or image.mask_uri is None:
        return np.zeros((image.height or 0, image.width or 0), dtype=np.int32)
    try:
        return label_regions(read_mask(image.mask_uri))
    except StoreError:
        raise
    except Exception as error:  # decoders raise all kinds of errors for broken files
        logger.warning("the mask %s is left out: %s: %s", image.mask_uri, type(error).__name__, error)
        return None


def _merged(parts: Mapping[str, PixelHistogram], labels: Sequence[str]) -> PixelHistogram | None:
    found = [parts[label] for label in labels if label in parts]
    if not found:
        return None
    whole = found[0]
    for part in found[1:]:
        whole = whole + part
    return whole


def _thin(curve: Curve) -> Curve:
    """Thins a curve to points at equal distances along it, so that steep and flat parts keep their shape."""
    x, y = curve
    length = np.concatenate([[0.0], np.cumsum(np.diff(x) + np.diff(y))])
    places = np.unique(np.searchsorted(length, np.linspace(0.0, length[-1], _CURVE_POINTS)).clip(0, len(x) - 1))
    return x[places], y[places]


def rank_failures(
    images: Sequence[LabelledImage], configuration: Configuration, most: int
) -> tuple[list[int], list[int]]:
    """Finds the good images that score highest and the anomalous ones that score lowest, worst first, by number.

    Scores of different classes are not comparable. So a good image is ranked by the share of anomalous images of its
    class that score lower, and an anomalous one by the share of good images that score higher.
    """
    beaten: dict[int, tuple[float, float]] = {}
    for numbers in _by_class(images):
        scored = [(number, score.score) for number in numbers if (score := configuration.scores[number]) is not None]
        good = np.array([value for number, value in scored if images[number].is_good])
        bad = np.array([value for number, value in scored if not images[number].is_good])
        if not len(good) or not len(bad):
            continue
        for number, value in scored:
            if images[number].is_good:
                beaten[number] = float((bad < value).mean()), value
            else:
                beaten[number] = float((good > value).mean()), -value
    worst = sorted((number for number, (share, _) in beaten.items() if share > 0), key=lambda n: (*beaten[n], -n))[::-1]
    return (
        [number for number in worst if images[number].is_good][:most],
        [number for number in worst if not images[number].is_good][:most],
    )


def _by_class(images: Sequence[LabelledImage]) -> Iterator[list[int]]:
    order = sorted(range(len(images)), key=lambda number: images[number].class_name)
    for _, group in groupby(order, key=lambda number: images[number].class_name):
        yield list(group)
