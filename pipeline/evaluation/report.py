"""Composes the report of an evaluation: tables first, then curves, distributions, and the worst failures."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evaluation.document import (
    HEADERS,
    Block,
    Heading,
    Picture,
    Sheet,
    Text,
    metric_cells,
    percent,
    published_cells,
)
from pipeline.evaluation.measure import PIXEL_METRICS, Measured, Row, rank_failures
from pipeline.evaluation.published import PUBLISHED, TITLES, Benchmark
from pipeline.evaluation.score import Scored
from pipeline.images import decode_image, decode_mask, upsample
from pipeline.storage import StoreError
from schemas.job import EMBEDDED_NOTE

logger = logging.getLogger(__name__)

_FAILURES_SHOWN = 6
"""Number of good, and of anomalous, images that are shown as failures."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The content of a report. base: the compared keys in the first configuration; empty without a comparison."""

    run_id: str
    model: str
    is_embedded: bool
    images_uri: str
    base: str
    benchmark: Benchmark | None
    scored: Scored
    measured: Measured

    def rows(self, level: str, configuration: str | None = None) -> list[Row]:
        """Returns the rows of a level (mean, class or defect), of one configuration or of all."""
        rows = [row for row in self.measured.rows if row["level"] == level]
        return [row for row in rows if configuration in (None, row["configuration"])]


def compose(evaluation: Evaluation, read: Callable[[str], bytes], max_pixels: int) -> list[Block]:
    """Composes the report. read: returns the bytes of a photo or mask at an address.

    Raises StoreError where a store cannot be used.
    """
    blocks: list[Block] = [Heading(f"Evaluation of run {evaluation.run_id}"), *(map(Text, facts(evaluation)))]
    first, *others = [item.name for item in evaluation.scored.configurations]
    if others:
        blocks += [Heading("Configurations, means over classes"), _sheet(evaluation.rows("mean"), ("configuration",))]
        blocks.append(Text(f"{first}: {evaluation.base}. The names of the others say how they differ from it."))
    if evaluation.benchmark is not None:
        blocks += _published(evaluation.benchmark)
    blocks += _classes(evaluation, first)
    if evaluation.rows("defect", first):
        blocks += [
            Heading(f"Kinds of defect, {first}"),
            Text("Each kind is measured against all good images of its class."),
            _sheet(evaluation.rows("defect", first), ("class_name", "label", "anomalous")),
        ]
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no matplotlib, so the report has no pictures: pip install 'alfa-pipeline[evaluate]'")
    else:
        blocks += _pictures(evaluation, read, max_pixels)
    for name in others:
        blocks += _classes(evaluation, name)
    return blocks


def _classes(evaluation: Evaluation, name: str) -> list[Block]:
    rows = [*evaluation.rows("class", name), *evaluation.rows("mean", name)]
    return [Heading(f"Classes, {name}"), _sheet(rows, ("class_name", "good", "anomalous"))]


def _published(benchmark: Benchmark) -> list[Block]:
    rows = [[row.method, *published_cells(row), row.note] for row in PUBLISHED[benchmark]]
    return [
        Heading(f"Published ({TITLES[benchmark]})"),
        Text("Zero-shot unless noted otherwise; means over the whole data set: only the same images are comparable."),
        Sheet(("method", *HEADERS, "note"), rows),
    ]


def facts(evaluation: Evaluation) -> list[str]:
    """Returns the lines that a reader needs to understand the numbers, a sentence or two each."""
    lines = [f"Images: {evaluation.images_uri}. Model: {evaluation.model}."]
    if evaluation.is_embedded:
        lines.append(f"{evaluation.model} is {EMBEDDED_NOTE}.")
    mean = evaluation.rows("mean")[0]
    lines.append(
        "All values in percent. Image metrics are exact. Pixel metrics are at the size of the ground truth; each pixel "
        "counts once. PRO: mean share of a defect region (8-connected) that is found, over false positive rates 0 to "
        "0.3, divided by 0.3."
    )
    for row in evaluation.rows("mean"):
        if row.get("recall") is not None and row.get("false_positive_rate") is not None:
            lines.append(
                f"{row['configuration']}: the job's threshold marks {percent(row['recall'])} % of the anomalous and "
                f"{percent(row['false_positive_rate'])} % of the good images."
            )
    if mean.get("draws"):
        lines.append(
            f"Peers were drawn from {mean['draws']} nights, which hold all good images and few anomalous ones; all "
            f"images were scored each time. Values are means over the draws, with their standard deviation."
        )
    errors = [row[f"{name}_error"] for row in evaluation.measured.rows for name in PIXEL_METRICS]
    known = [error for error in errors if error is not None]
    if known:
        lines[-1] += (
            f" They come from histograms: the exact values lie within {100 * max(known):.1g} percentage points of them."
        )
    for count, text in (
        (mean["errors"], "images could not be scored and are left out"),
        (mean["unmasked"], "anomalous images have no usable mask and are left out of pixel metrics"),
    ):
        if count:
            lines.append(f"{count} {text}.")
    one_sided = [row["class_name"] for row in evaluation.rows("class") if row["image_auroc"] is None]
    if one_sided:
        names = ", ".join(dict.fromkeys(one_sided))
        lines.append(f"Image metrics need good and anomalous images; these classes lack one of them: {names}.")
    return lines


def _sheet(rows: Sequence[Row], words: Sequence[str]) -> Sheet:
    header = [name.replace("class_name", "class") for name in words]
    cells = [[str("mean" if row.get(name) is None else row[name]) for name in words] for row in rows]
    return Sheet((*header, *HEADERS), [[*w, *metric_cells(row)] for w, row in zip(cells, rows, strict=True)])


def _pictures(evaluation: Evaluation, read: Callable[[str], bytes], max_pixels: int) -> Iterator[Block]:
    from pipeline.evaluation.pictures import draw_curves, draw_distributions

    images, first = evaluation.scored.images, evaluation.scored.configurations[0]
    rocs, pros = (
        {name: curve for (configuration, name), curve in curves.items() if configuration == first.name}
        for curves in (evaluation.measured.rocs, evaluation.measured.pros)
    )
    yield Heading("Curves")
    yield Picture("curves.png", draw_curves(images, first, rocs, pros), f"ROC and PRO curves a class, {first.name}")
    yield Heading("Scores")
    yield Picture("scores.png", draw_distributions(images, first), "Image scores, good against anomalous")
    for title, numbers in zip(
        ("Good images with the highest scores", "Anomalous images with the lowest scores"),
        rank_failures(images, first, _FAILURES_SHOWN),
        strict=True,
    ):
        yield Heading(title)
        if not numbers:
            yield Text("None: no good image scores above an anomalous one of its class.")
            continue
        yield Text(
            "Photo, anomaly map, ground truth. The colours of a map span the map values of its class. Worst first: by "
            "the share of the class's images of the other kind that score on the wrong side of this one."
        )
        kind = title.split()[0].lower()
        for place, number in enumerate(numbers):
            picture = _failure(evaluation, number, f"failures/{kind}-{place}.png", read, max_pixels)
            if picture is not None:
                yield picture


def _failure(
    evaluation: Evaluation, number: int, name: str, read: Callable[[str], bytes], max_pixels: int
) -> Picture | None:
    from pipeline.evaluation.pictures import draw_failure, tile_size

    image, scores = evaluation.scored.images[number], evaluation.scored.configurations[0].scores
    score = scores[number]
    assert score is not None and image.width is not None and image.height is not None  # it was ranked by its score
    caption = f"{image.class_name}: {image.key} ({image.label}), score {score.score:.4f}"
    height, width = tile_size(image.width, image.height)
    try:
        size = (height, width)
        photo = decode_image(read(image.uri), size=size, interpolation="bilinear", max_pixels=max_pixels).pixels
        truth: Any = np.zeros(size, dtype=bool)
        if not image.is_good:
            truth = None if image.mask_uri is None else _shrink(decode_mask(read(image.mask_uri)), size)
    except StoreError:
        raise
    except Exception as error:  # an image that is missing or broken now only costs its picture
        logger.warning("no picture of %s: %s: %s", image.uri, type(error).__name__, error)
        return None
    classmates = zip(evaluation.scored.images, scores, strict=True)
    grids = [other.grid for mate, other in classmates if mate.class_name == image.class_name and other is not None]
    span = float(min(grid.min() for grid in grids)), float(max(grid.max() for grid in grids))
    return Picture(name, draw_failure(photo, upsample(score.grid, width, height), truth, span), caption)


def _shrink(mask: Any, size: tuple[int, int]) -> Any:
    """Resizes a mask. A pixel is set if any pixel of its part of the mask is, so that small defects stay visible."""
    rows, columns = (np.arange(side) * side_to // side for side, side_to in zip(mask.shape, size, strict=True))
    small = np.zeros(size, dtype=bool)
    inside = np.argwhere(mask)
    small[rows[inside[:, 0]], columns[inside[:, 1]]] = True
    return small
