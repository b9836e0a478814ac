"""Draws the pictures of an evaluation as PNG: curves, distributions, failures. Needs matplotlib (extra `evaluate`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.evaluation.curves import count_values, rates
from pipeline.evaluation.measure import Configuration, Curve, LabelledImage
from pipeline.evaluation.pixels import PRO_LIMIT
from schemas.text import one_line

_MOST_CLASSES = 20
_TILE = 320
_GAP = 6
_GOOD, _ANOMALOUS = "#4477aa", "#cc6677"


def draw_curves(
    images: Sequence[LabelledImage],
    configuration: Configuration,
    rocs: Mapping[str, Curve],
    pros: Mapping[str, Curve],
) -> bytes:
    """Draws the ROC curves of image scores and of pixels and the PRO curve, a line for each of the first 20 classes."""
    figure, axes = _figure(1, 3, (13.0, 4.2))
    classes = _classes(images)
    for number, name in enumerate(classes[:_MOST_CLASSES]):
        style: dict[str, Any] = {"color": _colour(number), "label": _plain(name), "linewidth": 1.4}
        good, bad = _sides(images, configuration, name)
        counts = count_values(np.concatenate([good, bad]), np.repeat([False, True], [len(good), len(bad)]))
        if counts.has_both:
            axes[0].plot(rates(counts.normal), rates(counts.anomalous), **style)
        for axis, curves in ((axes[1], rocs), (axes[2], pros)):
            if name in curves:
                axis.plot(*curves[name], **style)
    texts = (
        ("ROC of images", "false positive rate", "true positive rate"),
        ("ROC of pixels", "false positive rate", "true positive rate"),
        (f"PRO up to {PRO_LIMIT:g}", "false positive rate of pixels", "mean share of a region found"),
    )
    for axis, (title, x, y) in zip(axes, texts, strict=True):
        axis.set(title=title, xlabel=x, ylabel=y, xlim=(0, 1), ylim=(0, 1.01))
        axis.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8, linestyle="--")
        axis.grid(alpha=0.25)
    axes[2].set_xlim(0, PRO_LIMIT)
    handles, names = axes[0].get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, names, loc="outside right center", fontsize=8)
    return _png(figure)


def draw_distributions(images: Sequence[LabelledImage], configuration: Configuration) -> bytes:
    """Draws histograms of the scores of good and anomalous images, a panel for each of the first 20 classes."""
    classes = _classes(images)[:_MOST_CLASSES]
    columns = min(4, len(classes))
    rows = -(-len(classes) // columns)
    figure, axes = _figure(rows, columns, (3.6 * columns + 0.6, 2.5 * rows + 0.6))
    flat = axes.ravel()
    for axis, name in zip(flat, classes, strict=False):
        good, bad = _sides(images, configuration, name)
        both = np.concatenate([good, bad])
        if len(both):
            edges = np.linspace(both.min(), both.max() + 1e-9, 25)
            axis.hist(good, edges, color=_GOOD, alpha=0.65, label="good")
            axis.hist(bad, edges, color=_ANOMALOUS, alpha=0.65, label="anomalous")
        axis.set_title(_plain(name), fontsize=10)
        axis.grid(alpha=0.25)
    for axis in flat[len(classes) :]:
        axis.set_visible(False)
    shown = next((axis for axis in flat if axis.get_legend_handles_labels()[0]), None)
    if shown is not None:
        shown.legend(fontsize=8)
    figure.supxlabel("score", fontsize=9)
    figure.supylabel("images", fontsize=9)
    return _png(figure)


def draw_failure(
    photo: NDArray[np.uint8],
    anomaly_map: NDArray[np.float32],
    truth: NDArray[np.bool_] | None,
    span: tuple[float, float],
) -> bytes:
    """Draws photo, map and ground truth side by side. All three have the same height and width [h, w].

    truth: None gives a grey tile. span: map values of the darkest and of the brightest colour.
    """
    import matplotlib

    low, high = span
    shade = np.clip((anomaly_map - low) / max(high - low, 1e-9), 0, 1)
    colours = (matplotlib.colormaps["inferno"](shade)[..., :3] * 255).astype(np.uint8)
    if truth is None:
        mask = np.full_like(photo, 128)
    else:
        mask = np.repeat(np.where(truth, np.uint8(255), np.uint8(0))[..., None], 3, axis=2)
    height, width = photo.shape[:2]
    sheet = Image.new("RGB", (3 * width + 2 * _GAP, height), "white")
    for place, tile in enumerate((photo, colours, mask)):
        sheet.paste(Image.fromarray(tile), (place * (width + _GAP), 0))
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((2 * (width + _GAP), 0, sheet.width - 1, height - 1), outline=(128, 128, 128))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def tile_size(width: int, height: int) -> tuple[int, int]:
    """Returns height and width of a tile of draw_failure: the longer side has 320 pixels."""
    scale = _TILE / max(width, height)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _classes(images: Sequence[LabelledImage]) -> list[str]:
    return sorted({image.class_name for image in images})


def _sides(
    images: Sequence[LabelledImage], configuration: Configuration, class_name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the scores of the good and of the anomalous images of a class."""
    pairs = [
        (image.is_good, score.score)
        for image, score in zip(images, configuration.scores, strict=True)
        if image.class_name == class_name and score is not None
    ]
    return np.array([s for good, s in pairs if good]), np.array([s for good, s in pairs if not good])


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    # pyplot would look for a window system, and keep every figure in memory.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns))
    return figure, axes


def _colour(number: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["tab20"](number % 20)


def _plain(name: str) -> str:
    """Shortens a class name for a picture, and escapes dollar signs, which would start a formula."""
    return one_line(name).replace("$", r"\$")[:24] or "?"


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
