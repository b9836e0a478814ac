"""Tests the nights from which peers are drawn, and the averages over draws."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.evaluation import LabelledImage, average_draws, draw_night
from pipeline.evaluation.measure import METRICS, Measured


def images_of(good: int, bad: int) -> list[LabelledImage]:
    labels = ["good"] * good + ["hole"] * bad
    return [LabelledImage(f"{number}", f"{number}", "nut", label, None) for number, label in enumerate(labels)]


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0), (0.01, 1), (0.05, 2), (0.5, 10)])
def test_a_night_has_all_good_images_and_the_wanted_share_of_others(rate: float, expected: int) -> None:
    images = images_of(38, 10)
    night = [int(row["uri"]) for row in draw_night(images, rate, 3)["nut"]]
    assert sorted(night)[:38] == list(range(38)) and len(night) == len(set(night)) == 38 + expected
    assert draw_night(images, rate, 3) == draw_night(images, rate, 3) != draw_night(images, rate, 4)


def test_rows_of_draws_have_their_mean_and_spread() -> None:
    def row(name: str, value: float | None) -> dict[str, Any]:
        return {"configuration": name, "level": "mean", **dict.fromkeys(METRICS, value), "recall": 0.5}

    measured = Measured([row("base, draw 0", 0.5), row("base, draw 1", 0.7), row("peers=0", None)])
    base, alone = average_draws(measured, {"base": ["base, draw 0", "base, draw 1"], "peers=0": ["peers=0"]}).rows
    assert (base["configuration"], base["draws"], base["recall"]) == ("base", 2, 0.5)
    assert (base["image_auroc"], base["image_auroc_spread"]) == (pytest.approx(0.6), pytest.approx(0.1))
    assert (alone["configuration"], alone["image_auroc"], alone["image_auroc_spread"]) == ("peers=0", None, None)
