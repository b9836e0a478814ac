"""Tests the rows that are measured from scores and masks: classes, kinds of defect, means, gaps, and worst images."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from pipeline.evaluation import LabelledImage, Score, measure
from pipeline.evaluation.measure import IMAGE_METRICS, METRICS, Configuration, Measured, rank_failures
from pipeline.images import upsample
from pipeline.storage import StoreError
from schemas.tables import EVALUATION

SIZE = (24, 16)
RNG = np.random.default_rng(5)


def image(name: str, class_name: str, label: str = "good", *, mask: bool = True) -> LabelledImage:
    uri = None if label == "good" or not mask else f"{class_name}/{name}"
    return LabelledImage(name, name, class_name, label, uri, *SIZE)


def scored(value: float) -> Score:
    return Score(value, value, value, (value + 0.2 * RNG.random((4, 4))).astype(np.float32))


def mask_of(uri: str) -> NDArray[np.bool_]:
    mask = np.zeros(SIZE[::-1], dtype=bool)
    mask[3:6, 4:9] = True
    mask[12, 20] = uri.endswith("2")
    return mask


IMAGES = [
    image("g1", "nut"), image("g2", "nut"), image("c1", "nut", "crack"), image("c2", "nut", "crack"),
    image("d1", "nut", "dent"), image("g1", "pill"), image("g2", "pill"), image("s1", "pill", "stain"),
]  # fmt: skip
SCORES = [scored(value) for value in (0.1, 0.5, 0.4, 0.9, 0.05, 0.2, 0.3, 0.8)]


def rows_of(measured: Measured) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {(row["level"], row.get("class_name"), row.get("label")): row for row in measured.rows}


def test_rows_per_class_kind_of_defect_and_their_mean() -> None:
    rows = rows_of(measure(IMAGES, [Configuration("base", SCORES)], mask_of, 2))
    assert list(rows) == [
        ("class", "nut", None),
        ("defect", "nut", "crack"),
        ("defect", "nut", "dent"),
        ("class", "pill", None),
        ("defect", "pill", "stain"),
        ("mean", None, None),
    ]
    nut, dent, mean = rows["class", "nut", None], rows["defect", "nut", "dent"], rows["mean", None, None]
    # nut: .1 .5 good; .4 .9 .05 anomalous: .4 beats one, .9 beats both, .05 none: 3 of 6 pairs
    assert (nut["good"], nut["anomalous"], nut["image_auroc"]) == (2, 3, 0.5)
    assert (dent["good"], dent["anomalous"], dent["image_auroc"]) == (2, 1, 0.0)
    assert rows["defect", "nut", "crack"]["image_auroc"] == 0.75
    assert mean["image_auroc"] == (0.5 + 1.0) / 2 and (mean["good"], mean["anomalous"]) == (4, 4)
    for metric in METRICS:
        assert mean[metric] == pytest.approx((nut[metric] + rows["class", "pill", None][metric]) / 2)
    assert {name for row in rows.values() for name in row} <= set(EVALUATION.names)


def test_pixels_are_those_of_the_maps_at_the_size_of_the_masks() -> None:
    rows = rows_of(measure(IMAGES, [Configuration("base", SCORES)], mask_of, 2))
    for key, labels in {("class", "nut", None): ("crack", "dent"), ("defect", "nut", "crack"): ("crack",)}.items():
        truth, values = [], []
        for item, score in zip(IMAGES, SCORES, strict=True):
            if item.class_name == "nut" and item.label in ("good", *labels):
                mask = np.zeros(SIZE[::-1], dtype=bool) if item.is_good else mask_of(str(item.mask_uri))
                truth.append(mask.ravel())
                values.append(upsample(score.grid, *SIZE).ravel())
        exact = roc_auc_score(np.concatenate(truth), np.concatenate(values))
        assert abs(rows[key]["pixel_auroc"] - exact) <= rows[key]["pixel_auroc_error"] + 1e-12 < 1e-3


def test_images_without_score_mask_or_counterpart_are_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    images = [
        *IMAGES,
        image("c3", "nut", "crack", mask=False),
        image("c4", "nut", "crack"),
        image("x", "tile"), image("y", "washer", "bent"),
    ]  # fmt: skip
    scores = [None, *SCORES[1:], scored(0.9), scored(0.9), scored(0.4), scored(0.6)]

    def read(uri: str) -> NDArray[np.bool_]:
        if uri == "nut/c4":
            raise ValueError("broken mask")
        return mask_of(uri)

    rows = rows_of(measure(images, [Configuration("base", scores)], read, 2))
    nut = rows["class", "nut", None]
    assert (nut["good"], nut["anomalous"], nut["errors"], nut["unmasked"]) == (1, 5, 1, 2)
    assert "nut/c4 is left out: ValueError: broken mask" in caplog.text
    assert rows["defect", "nut", "dent"]["unmasked"] == 0
    assert {rows["class", "tile", None][metric] for metric in METRICS} == {None}
    washer = rows["class", "washer", None]
    assert {washer[metric] for metric in IMAGE_METRICS} == {None} and washer["pixel_pro"] is not None
    # the mean is over nut and pill alone
    expected = (nut["image_auroc"] + rows["class", "pill", None]["image_auroc"]) / 2
    assert rows["mean", None, None]["image_auroc"] == pytest.approx(expected)


def test_a_store_out_of_use_is_not_taken_for_a_broken_mask() -> None:
    def read(uri: str) -> NDArray[np.bool_]:
        raise StoreError("no credentials")

    with pytest.raises(StoreError, match="no credentials"):
        measure(IMAGES, [Configuration("base", SCORES)], read, 2)


def test_configurations_are_measured_side_by_side_as_they_are_alone() -> None:
    other = [scored(1 - score.score) for score in SCORES]
    both = measure(IMAGES, [Configuration("a", SCORES), Configuration("b", other)], mask_of, 2)
    alone = measure(IMAGES, [Configuration("b", other)], mask_of, 2)
    assert [row for row in both.rows if row["configuration"] == "b"] == alone.rows
    assert set(both.rocs) == {(name, label) for name in "ab" for label in ("nut", "pill")}


def test_failures_are_the_images_furthest_on_the_wrong_side() -> None:
    good, anomalous = rank_failures(IMAGES, Configuration("base", SCORES), 5)
    assert [IMAGES[number].key for number in good] == ["g2", "g1"]  # g2 beats two of three, g1 one
    assert [IMAGES[number].key for number in anomalous] == ["d1", "c1"]
    assert rank_failures(IMAGES[5:], Configuration("base", SCORES[5:]), 5) == ([], [])


def test_memory_does_not_grow_with_the_number_of_photos() -> None:
    side = 1024
    mask = np.zeros((side, side), dtype=bool)
    mask[100:140, 200:300] = True

    def peak(count: int) -> int:
        images = [LabelledImage(f"{i}", f"{i}", "nut", "crack", f"{i}", side, side) for i in range(count)]
        images.append(LabelledImage("good", "good", "nut", "good", None, side, side))
        scores = [scored(0.5) for _ in images]
        tracemalloc.start()
        try:
            measured = measure(images, [Configuration("base", scores)], lambda uri: mask.copy(), 2)
            assert measured.rows[-1]["pixel_pro"] is not None
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # A photo and its map take some 30 MB while they are counted; 12 more photos must not add to it.
    assert peak(20) < 1.1 * peak(8)
