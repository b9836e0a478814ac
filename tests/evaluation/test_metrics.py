"""Tests metrics against values computed by hand and scikit-learn, and PRO against a slow, obvious reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from pipeline.evaluation.curves import Counts, area, auroc, average_precision, count_values, f1_max
from pipeline.evaluation.pixels import Bins, PixelHistogram, label_regions

Maps = list[tuple[NDArray[np.float32], NDArray[np.bool_]]]


def best_f1(truth: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    precision, recall, _ = precision_recall_curve(truth, scores)
    return float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max())


def slow_pro(maps: Maps, limit: float = 0.3) -> float:
    """Every distinct value as a threshold, every region by itself; the last stretch interpolated at the limit."""
    normal = np.concatenate([values[~mask] for values, mask in maps])
    regions = []
    for values, mask in maps:
        left = {tuple(place) for place in np.argwhere(mask)}
        while left:
            front = [left.pop()]
            region = []
            while front:
                row, column = front.pop()
                region.append(values[row, column])
                near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
                left -= near
                front += near
            regions.append(np.array(region))
    xs, ys = [0.0], [0.0]
    for threshold in sorted({float(value) for values, _ in maps for value in values.ravel()}, reverse=True):
        xs.append(float((normal >= threshold).mean()))
        ys.append(float(np.mean([(region >= threshold).mean() for region in regions])))
    total = 0.0
    for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        total += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    return total / limit


def random_maps(seed: int, images: int = 4, levels: int | None = None) -> Maps:
    """Maps [12, 10] that follow their masks a little; levels: how many distinct values, for ties."""
    rng = np.random.default_rng(seed)
    maps: Maps = []
    for _ in range(images):
        mask = rng.random((12, 10)) < 0.12
        values = rng.random((12, 10)) + 0.4 * mask
        values = values if levels is None else np.floor(values * levels) / levels
        maps.append((values.astype(np.float32), mask))
    return maps


def histogram(maps: Maps, bins: Bins) -> PixelHistogram:
    whole = PixelHistogram(bins)
    for values, mask in maps:
        whole.add(values, label_regions(mask))
    return whole


def test_image_metrics_by_hand() -> None:
    # ranked: A .9, G .8, A .8 (tied), G .3
    counts = count_values(np.array([0.9, 0.8, 0.8, 0.3]), np.array([True, False, True, False]))
    assert counts.anomalous.tolist() == [0, 1, 1] and counts.normal.tolist() == [1, 1, 0]
    # pairs (A, G): .9 beats both, .8 ties one and beats one: 3.5 of 4
    assert auroc(counts).value == 3.5 / 4  # type: ignore[union-attr]
    # half of the anomalous at precision 1, the other half at 2/3
    assert average_precision(counts).value == pytest.approx((1 + 2 / 3) / 2)  # type: ignore[union-attr]
    # all three marked: precision 2/3, recall 1
    assert f1_max(counts).value == pytest.approx(0.8)  # type: ignore[union-attr]


def test_pro_by_hand() -> None:
    # Two regions: one pixel, and two pixels that touch at a corner. Six normal pixels.
    mask = np.array([[1, 0, 0], [0, 0, 1], [0, 1, 0]], dtype=bool)
    values = np.array([[0.9, 0.1, 0.2], [0.3, 0.5, 0.8], [0.0, 0.4, 0.25]], dtype=np.float32)
    regions = label_regions(mask)
    assert regions.max() == 2
    # Thresholds: .9 -> overlap (1 + 0) / 2; .8 -> (1 + 1/2) / 2 = 0.75; .5 -> one of six normal pixels, 1/6;
    # .4 -> (1 + 1) / 2; .3 -> 2/6, beyond 0.3. Area: 1/6 * 0.75 under a step up to 1/6, then 1 up to 0.3.
    whole = histogram([(values, mask)], Bins(0.0, 1.0))
    expected = (1 / 6 * 0.75 + (0.3 - 1 / 6) * 1.0) / 0.3
    pro = whole.measure()["pixel_pro"]
    assert pro is not None and pro.value == pytest.approx(expected) and pro.error < 1e-12
    assert slow_pro([(values, mask)]) == pytest.approx(expected)


def test_area_is_cut_and_interpolated_at_the_limit() -> None:
    x, y = np.array([0.0, 0.2, 0.6, 1.0]), np.array([0.0, 0.4, 0.8, 1.0])
    # triangle to 0.2, trapezoid from 0.2 to 0.3 where y = 0.5
    found = area(x, y, 0.3)
    assert found.value == pytest.approx((0.04 + 0.045) / 0.3)
    assert found.value + found.error == pytest.approx((0.2 * 0.4 + 0.1 * 0.8) / 0.3)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=60))
def test_image_metrics_agree_with_scikit_learn(items: list[tuple[int, bool]]) -> None:
    scores, truth = np.array([score / 12 for score, _ in items]), np.array([label for _, label in items])
    counts = count_values(scores, truth)
    found = auroc(counts), average_precision(counts), f1_max(counts)
    if truth.all() or not truth.any():
        assert found == (None, None, None)
        return
    expected = roc_auc_score(truth, scores), average_precision_score(truth, scores), best_f1(truth, scores)
    assert [item.value for item in found if item is not None] == pytest.approx(list(expected), abs=1e-12)


@pytest.mark.parametrize("levels", [None, 7])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_pixel_metrics_are_exact_in_fine_bins(seed: int, levels: int | None) -> None:
    maps = random_maps(seed, levels=levels)
    scores = np.concatenate([values.ravel() for values, _ in maps])
    truth = np.concatenate([mask.ravel() for _, mask in maps])
    found = histogram(maps, Bins(0.0, 1.5, 1 << 22)).measure()
    expected = {
        "pixel_auroc": roc_auc_score(truth, scores),
        "pixel_aupr": average_precision_score(truth, scores),
        "pixel_f1_max": best_f1(truth, scores),
        "pixel_pro": slow_pro(maps),
    }
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, abs=1e-9), name  # type: ignore[union-attr]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000), count=st.sampled_from([1, 2, 5, 17, 64, 513]), levels=st.sampled_from([None, 5, 40])
)
def test_the_exact_value_lies_within_the_stated_error(seed: int, count: int, levels: int | None) -> None:
    maps = random_maps(seed, images=2, levels=levels)
    scores = np.concatenate([values.ravel() for values, _ in maps])
    truth = np.concatenate([mask.ravel() for _, mask in maps])
    if truth.all() or not truth.any():
        return
    # Bins over less than the range: what falls outside is counted at the ends, and the bound knows.
    found = histogram(maps, Bins(0.2, 1.1, count)).measure()
    exact = {
        "pixel_auroc": roc_auc_score(truth, scores),
        "pixel_aupr": average_precision_score(truth, scores),
        "pixel_f1_max": best_f1(truth, scores),
        "pixel_pro": slow_pro(maps),
    }
    for name, value in exact.items():
        item = found[name]
        assert item is not None and abs(item.value - value) <= item.error + 1e-9, (name, item, value)


def test_65536_bins_over_a_narrow_band_leave_an_error_below_one_in_ten_thousand() -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((1024, 1024), dtype=bool)
    mask[100:180, 300:420] = mask[700:716, 50:66] = True
    values = (0.5 + 0.004 * rng.standard_normal((1024, 1024)) + 0.004 * mask).astype(np.float32)
    found = histogram([(values, mask)], Bins(float(values.min()), float(values.max()))).measure()
    for name, item in found.items():
        assert item is not None and item.error < 1e-4, name
    exact = roc_auc_score(mask.ravel(), values.ravel())
    auc = found["pixel_auroc"]
    assert auc is not None and abs(auc.value - exact) <= auc.error


def test_merged_parts_are_one_pass() -> None:
    maps, bins = random_maps(3, images=6), Bins(0.0, 1.5)
    merged, whole = histogram(maps[:2], bins) + histogram(maps[2:], bins), histogram(maps, bins)
    assert np.array_equal(merged.counts.normal, whole.counts.normal)
    assert np.array_equal(merged.counts.anomalous, whole.counts.anomalous)
    np.testing.assert_allclose(merged.overlap, whole.overlap, rtol=1e-12)
    assert merged.regions == whole.regions
    with pytest.raises(ValueError, match="different bins"):
        whole + PixelHistogram(Bins(0.0, 1.0))


@pytest.mark.parametrize("value", [False, True])
def test_without_pixels_of_both_kinds_there_is_no_metric(value: bool) -> None:
    whole = histogram([(np.full((4, 4), 0.5, dtype=np.float32), np.full((4, 4), value))], Bins(0.0, 1.0))
    assert set(whole.measure().values()) == {None}
    assert not Counts(np.array([], dtype=np.int64), np.array([], dtype=np.int64)).has_both


def test_a_map_of_one_value_is_chance() -> None:
    mask = np.zeros((10, 10), dtype=bool)
    mask[:2, :5] = True
    found = histogram([(np.full((10, 10), 0.5, dtype=np.float32), mask)], Bins(0.5, 0.5)).measure()
    # One threshold: from nothing found to all found; PRO is the triangle up to 0.3, over 0.3.
    assert {name: item.value for name, item in found.items() if item} == pytest.approx(
        {"pixel_auroc": 0.5, "pixel_aupr": 0.1, "pixel_f1_max": 0.2 / 1.1, "pixel_pro": 0.15}
    )
