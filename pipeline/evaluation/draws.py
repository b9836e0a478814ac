"""Simulates realistic nights: draws the peers from mostly good images, several times, and averages the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.evaluation.measure import AT_THRESHOLD, METRICS, Configuration, LabelledImage, Measured
from pipeline.evaluation.score import Scored

Row = dict[str, Any]


def draw_night(images: Sequence[LabelledImage], anomaly_rate: float, seed: int) -> dict[str, list[Row]]:
    """Draws a night from which the peers of each class are taken. Returns its rows by class, in random order.

    The night of a class holds all of its good images, and a random choice of its anomalous ones. Their share is
    `anomaly_rate`, but at least one is chosen unless the rate is 0.
    """
    chance = np.random.default_rng(seed)
    found: dict[str, list[Row]] = {}
    for name in sorted({image.class_name for image in images}):
        good, bad = ([i for i in images if i.class_name == name and i.is_good is side] for side in (True, False))
        wanted = max(1, round(len(good) * anomaly_rate / (1 - anomaly_rate))) if anomaly_rate else 0
        night = [*good, *(bad[place] for place in chance.permutation(len(bad))[:wanted])]
        found[name] = [{"uri": night[place].uri} for place in chance.permutation(len(night))]
    return found


def average_draws(measured: Measured, draws: Mapping[str, Sequence[str]]) -> Measured:
    """Averages the rows of configurations that differ only in their draw.

    draws: for each configuration, the names under which its draws were measured. The rows get the mean of each metric,
    the number of draws, and the standard deviations in columns that end in _spread. Curves are those of the first draw.
    """
    by_name: dict[str, list[Row]] = {}
    for row in measured.rows:
        by_name.setdefault(row["configuration"], []).append(row)
    rows = [
        _average(name, [dict(row) for row in same])
        for name, names in draws.items()
        for same in zip(*(by_name[drawn] for drawn in names), strict=True)
    ]
    first = {names[0]: name for name, names in draws.items()}
    curves = [
        {(first[name], known): curve for (name, known), curve in part.items() if name in first}
        for part in (measured.rocs, measured.pros)
    ]
    return Measured(rows, *curves)


def first_draws(scored: Scored, draws: Mapping[str, Sequence[str]]) -> Scored:
    """Selects the scores of each configuration's first draw, which are shown and stored for single images."""
    by_name = {configuration.name: configuration for configuration in scored.configurations}
    chosen = [Configuration(name, by_name[names[0]].scores) for name, names in draws.items()]
    return Scored(scored.images, chosen)


def _average(name: str, rows: Sequence[Row]) -> Row:
    row = {**rows[0], "configuration": name, "draws": len(rows)}
    for metric in (*METRICS, *AT_THRESHOLD):
        values = [one[metric] for one in rows if one.get(metric) is not None]
        row[metric] = float(np.mean(values)) if values else None
        if metric in METRICS:
            row[f"{metric}_spread"] = float(np.std(values)) if len(rows) > 1 and values else None
    return row
