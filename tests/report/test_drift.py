"""Tests the comparison of two nights, with numbers computed by hand."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from jobs.diff import NightError, run_diff
from pipeline.lake import publish_night
from pipeline.report.drift import ClassDrift, compare_class, psi, read_pairs
from pipeline.storage import Store
from tests.command import alfa
from tests.nights import run_of, write_shard
from tests.stats import write_stats

Row = tuple[str, str, float | None]
"""Class, image (its address, and its version behind an @) and score; None: an error."""

EVEN = [0.05 + 0.1 * step for step in range(10)]
FIRST, SECOND = "2026-01-02", "2026-01-03"


def publish(output: Store, night: str, rows: Sequence[Row], model: str = "model") -> None:
    """A night with threshold 0.5."""
    run = replace(run_of(output, "run", night), model=model)
    records = [
        {
            "class_name": class_name,
            "image_key": name,
            "image_uri": name.partition("@")[0],
            "status": "error" if score is None else "ok",
            "error_type": "corrupt" if score is None else None,
            "score": score,
            "is_anomalous": None if score is None else score >= 0.5,
        }
        for class_name, name, score in rows
    ]
    write_shard(output, run, "one", records)
    write_stats(output, run.run_id, images_per_second=12.5)
    publish_night(run, "m", run.shards, ["one"], output, "test")


def scores_of(class_name: str, scores: Sequence[float | None]) -> list[Row]:
    return [(class_name, f"{class_name}/{number}", score) for number, score in enumerate(scores)]


def drifts(output: Store) -> list[ClassDrift]:
    return [compare_class(*pair)[0] for pair in read_pairs(output, FIRST, SECOND)]


def changes(output: Store) -> dict[str, list[tuple[str, str, Any, Any]]]:
    """By class, each changed photo with what has changed and its scores."""
    found = {pair[0]: compare_class(*pair)[1].read(output, pair[0]) for pair in read_pairs(output, FIRST, SECOND)}
    return {
        name: [(row["image_uri"], row["change"], row["score_before"], row["score_after"]) for row in rows]
        for name, rows in found.items()
    }


def test_psi_is_that_of_smoothed_decile_shares() -> None:
    before, after = np.asarray(EVEN), np.zeros(10)
    # Each decile holds one of ten: 1.5 / 15. All of the second night lie in the lowest: 10.5 / 15, elsewhere 0.5 / 15.
    expected = (0.7 - 0.1) * math.log(7) + 9 * (1 / 30 - 0.1) * math.log(1 / 3)
    assert psi(before, after) == pytest.approx(expected) == pytest.approx(1.82671, abs=1e-5)
    assert psi(before, before) == 0


def test_psi_of_constant_scores_has_two_bins() -> None:
    # Below 0.5 and from it on: (0.5, 4.5) / 5 against (2.5, 2.5) / 5.
    before, after = np.full(4, 0.5), np.asarray([0.1, 0.2, 0.5, 0.9])
    assert psi(before, after) == pytest.approx(0.4 * math.log(5) + (0.5 - 0.9) * math.log(5 / 9))


def test_a_class_drifts_where_the_shift_is_large_and_no_chance(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    publish(output, FIRST, [*scores_of("bolt", EVEN), *scores_of("few", [0.1, 0.2, 0.3]), *scores_of("gone", [0.1])])
    publish(
        output, SECOND, [*scores_of("bolt", [0.0] * 10), *scores_of("few", [0.7, 0.8, 0.9]), *scores_of("nut", [None])]
    )
    bolt, few, gone, nut = drifts(output)
    # Of all ways to mix ten with ten, two keep them apart.
    assert (bolt.ks, bolt.p_value) == (1.0, pytest.approx(2 / math.comb(20, 10)))
    assert bolt.psi == pytest.approx(1.82671, abs=1e-5) and bolt.drifted
    assert bolt.median == (pytest.approx(0.5), 0.0) and bolt.anomalous == (5, 0)
    assert (few.ks, few.p_value) == (1.0, pytest.approx(2 / math.comb(6, 3)))
    assert few.psi is not None and few.psi > 0.25 and not few.drifted
    assert (gone.images, gone.ks, gone.drifted) == ((1, 0), None, False)
    assert (nut.images, nut.errors, nut.psi) == ((0, 1), (0, 1), None)


def test_a_changed_model_is_named_beside_the_drift_that_it_makes(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    publish(output, FIRST, scores_of("bolt", EVEN))
    publish(output, SECOND, scores_of("bolt", EVEN), model="another")
    (bolt,) = drifts(output)
    assert bolt.changed == ("model",) and not bolt.drifted and bolt.psi == 0


def test_changed_verdicts_are_told_by_the_image_and_its_class(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    same = [("bolt", "still-good", 0.1), ("bolt", "still-bad", 0.9), ("bolt", "broken", None)]
    before = [("bolt", "a", 0.2), ("bolt", "b", 0.8), ("nut", "c", None), ("nut", "d", 0.9), ("nut", "other", 0.1)]
    after = [("bolt", "a", 0.7), ("bolt", "b", 0.3), ("bolt", "other", 0.75), ("nut", "c", 0.6), ("nut", "e", 0.95)]
    publish(output, FIRST, [*same, *before, ("nut", "g", 0.2), ("nut", "h", 0.2)])
    publish(output, SECOND, [*same, *after, ("nut", "g", 0.2), ("nut", "h", 0.2)])
    near = pytest.approx
    assert changes(output) == {
        "bolt": [
            ("other", "new", None, near(0.75)),
            ("a", "became", near(0.2), near(0.7)),
            ("b", "resolved", near(0.8), near(0.3)),
        ],
        "nut": [("e", "new", None, near(0.95)), ("c", "new", None, near(0.6))],
    }
    bolt, nut = drifts(output)
    assert (bolt.common, nut.common) == (4, 2)


def test_a_night_of_other_photos_is_compared_by_rates_and_not_by_verdicts(tmp_path: Path) -> None:
    """As nights with select: new are: one photo was tried again, and two have changed since the night before."""
    output, text = Store(str(tmp_path)), io.StringIO()
    tried_again = ("bolt", "first/0", 0.9)
    changed = [("bolt", "first/1@2", 0.9), ("bolt", "first/9@2", 0.1)]
    publish(output, FIRST, [("bolt", f"first/{n}", score) for n, score in enumerate(EVEN)])
    publish(
        output,
        SECOND,
        [*(("bolt", f"second/{n}", score) for n, score in enumerate(EVEN[4:])), tried_again, *changed],
    )
    (bolt,) = drifts(output)
    assert bolt.common == 1 and bolt.is_of_other_photos and bolt.rates == (5 / 10, 7 / 9)
    assert [change[:2] for change in changes(output)["bolt"]] == [("first/0", "became")]
    assert run_diff(output, None, None, Console(file=text, width=200)) == 0
    lines = [line for line in text.getvalue().splitlines() if line.startswith(("┃", "│"))]
    head, row = (re.split(r"\s*[┃│]\s*", line)[1:-1] for line in lines[:2])
    said = dict(zip(head, row, strict=True))
    assert (said["anomalous"], said["share"], said["verdict"]) == ("5 > 7", "50.0% > 77.8%", "steady")
    assert "1 was normal, 0 new photo, 0 normal again" in text.getvalue()
    assert "most photos are new since the night before" in text.getvalue()


def test_diff_compares_the_last_two_nights_and_fails_on_drift_alone_when_asked(tmp_path: Path) -> None:
    output, text = Store(str(tmp_path / "lake")), io.StringIO()
    console = Console(file=text, width=200)
    with pytest.raises(NightError, match="no night is published"):
        run_diff(output, None, None, console)
    publish(output, FIRST, scores_of("bolt", EVEN))
    assert run_diff(output, None, None, console, fail_on_drift=True) == 0 and text.getvalue() == ""
    publish(output, SECOND, scores_of("[red]bolt", EVEN))
    assert run_diff(output, None, None, console, fail_on_drift=True) == 0 and "[red]bolt" in text.getvalue()
    publish(output, "2026-01-04", scores_of("bolt", [0.0] * 10))

    shown = alfa("diff", output.uri(""), FIRST, "2026-01-04", "--json", tmp_path / "diff.json", "--fail-on-drift")
    assert shown.returncode == 1 and "scores drift: bolt" in shown.stderr and "drifts" in shown.stdout
    report = json.loads((tmp_path / "diff.json").read_text())
    assert (report["before"], report["after"], report["drifted"]) == (FIRST, "2026-01-04", ["bolt"])
    assert [item["change"] for item in report["images"]] == ["resolved"] * 5
    assert [(night["run_date"], night["anomalous"], night["images_per_second"]) for night in report["nights"]] == [
        (FIRST, 5, 12.5),
        (SECOND, 5, 12.5),
        ("2026-01-04", 0, 12.5),
    ]
    assert run_diff(output, FIRST, "2026-01-04", console) == 0
    with pytest.raises(NightError, match="night 2026-02-30 is not published"):
        run_diff(output, FIRST, "2026-02-30", console)
