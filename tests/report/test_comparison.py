"""Tests the report's comparison with the night before, with numbers computed by hand."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.report import load_report, render
from pipeline.report.loading import MOST_CHANGES
from pipeline.storage import Store
from schemas.records import Commit
from tests.nights import NIGHT
from tests.report.nights import failed, publish, scored
from tests.report.page import Page

BEFORE, LATER = "2026-01-01", "2026-01-03"


def night(folder: Path, date: str, scores: Mapping[str, float | None], **stats: Any) -> Commit:
    """Publishes images by class/name; None: an error. The threshold is 0.6."""
    photos = folder / "in"
    rows = [
        failed(key, key.split("/")[0], photos, "damaged")
        if score is None
        else scored(key, key.split("/")[0], score, photos)
        for key, score in scores.items()
    ]
    return publish(folder / "out", photos, rows, night=date, **stats)


def read(folder: Path, commit: Commit) -> tuple[Any, Page]:
    report = load_report(Store(str(folder / "out")), commit)
    return report.comparison, Page(render(report))


@pytest.fixture
def two_nights(tmp_path: Path) -> tuple[Path, list[Commit]]:
    """Bolts fall from an even spread to almost 0; one nut is newly anomalous, one is new, one an error."""
    even = {f"bolt/{n}.jpg": 0.05 + 0.1 * n for n in range(10)}
    first = night(tmp_path, BEFORE, {**even, "nut/a.jpg": 0.5, "nut/c.jpg": 0.5}, scoring_images_per_second=8)
    second = {
        **{f"bolt/{n}.jpg": 1e-6 * (9 - n) for n in range(10)},
        "nut/a.jpg": 0.9,
        "nut/b.jpg": 0.7,
        "nut/c.jpg": None,
    }
    return tmp_path, [first, night(tmp_path, NIGHT, second)]


def test_changes_drift_and_trend_are_said(two_nights: tuple[Path, list[Commit]]) -> None:
    folder, (_, commit) = two_nights
    found, page = read(folder, commit)
    assert (found.before, found.fault, found.counts) == (BEFORE, None, {"became": 1, "new": 1, "resolved": 4})
    # The gallery takes the classes in turn, the higher score first.
    order = ["nut/a.jpg", "nut/b.jpg", *(f"bolt/{n}.jpg" for n in range(6, 10))]
    assert [item.key for item in found.images] == order
    assert [item.exhibit for item in found.images[:2]] == [0, 2]
    shown = [page.data["images"]["key"][page.data["images"]["exhibit"].index(item.exhibit)] for item in found.images]
    assert shown == order
    bolt, nut = found.classes
    assert bolt.psi == pytest.approx(1.82671, abs=1e-5) and (bolt.drifted, nut.drifted) == (True, False)
    for words in (
        "Since 2026-01-01 newly anomalous, was normal1 newly anomalous, new photo1 normal again4",
        "6 images with another verdict",
        "was normal0.500 → 0.900nutnut/a.jpg new photo0.700nutnut/b.jpg normal again0.650 → 0.000boltbolt/6.jpg",
        "PSI is 0.25 or more",
        "p of the Kolmogorov-Smirnov test is below 0.01",
        "bolt 10 → 10 0 → 0 4 → 0 40.0% → 0.0% 0.500 → 0.000 1.827 1.000 < 0.001 drifts",
        "nut 2 → 3 0 → 1 0 → 2 0.0% → 100.0% 0.500 → 0.800",
        "Last 2 nights",
        "2026-01-01124 · 33.33%0.00%8.00 2026-01-02132 · 15.38%7.69%12.50",
    ):
        assert words in page.words, words
    bars = [attributes["width"] for tag, attributes in page.elements if tag == "rect" and "x" not in attributes]
    assert bars == ["60.0", "27.7", "60.0"]  # 60 (2 / 13) / (4 / 12) = 27.7; the first night has no errors


def test_the_first_night_has_nothing_to_be_compared_with(two_nights: tuple[Path, list[Commit]]) -> None:
    folder, (first, _) = two_nights
    found, page = read(folder, first)
    assert found.before is None and found.fault is None and not found.trend
    assert "This is the first night, so there is none to compare it with." in page.words and "Since" not in page.words


def test_a_night_is_compared_with_the_last_published_one(two_nights: tuple[Path, list[Commit]]) -> None:
    folder, _ = two_nights
    found, page = read(folder, night(folder, LATER, {"nut/a.jpg": 0.9, "cap/a.jpg": 0.1}))
    assert found.before == NIGHT and sum(found.counts.values()) == 0
    assert [item.verdict for item in found.classes] == ["no photos any more", "new class", "steady"]
    assert "with another verdict" not in page.words and "Last 3 nights" in page.words


def test_a_night_removed_by_hand_is_named_and_costs_no_report(two_nights: tuple[Path, list[Commit]]) -> None:
    folder, (first, commit) = two_nights
    shutil.rmtree(folder / "out" / "runs" / first.run_id)
    for entry in first.files:
        (folder / "out" / entry.key).unlink(missing_ok=True)
    found, page = read(folder, commit)
    assert "FileNotFoundError" in found.fault and "Earlier nights could not be read." in page.words
    assert f"Since {BEFORE}" in page.words and len(page.data["exhibits"]) == 12
    assert "2026-01-01124 · 33.33%0.00%\u2013" in page.words  # the commit still says so
    (folder / "out" / "commits" / f"{BEFORE}.json").write_text("{")
    found, page = read(folder, commit)
    assert "RecordError" in found.fault and not found.trend
    assert "Earlier nights could not be read." in page.words


def test_changes_are_bounded_counted_and_fairly_chosen(tmp_path: Path) -> None:
    normal, anomalous = 0.1, 0.9
    first = {f"bolt/{n:02}.jpg": normal for n in range(60)} | {"nut/a.jpg": normal, "nut/b.jpg": anomalous}
    night(tmp_path, BEFORE, first)
    flipped = {key: normal if score == anomalous else 0.7 for key, score in first.items()}
    found, page = read(tmp_path, night(tmp_path, NIGHT, flipped))
    assert found.counts == {"became": 61, "new": 0, "resolved": 1} and len(found.images) == MOST_CHANGES
    assert [item.key for item in found.images if item.class_name == "nut"] == ["nut/a.jpg"]
    assert "50 of 62 images with another verdict, classes in equal shares" in page.words
