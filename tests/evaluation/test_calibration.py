"""Tests calibrated thresholds against values computed by hand, and against all possible thresholds."""

from __future__ import annotations

import datetime
import json
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation import calibrate_class, check_policy
from pipeline.evaluation.calibration import ClassScores, best_f1, false_positive_threshold
from pipeline.scoring import ThresholdError, Thresholds, parse_table, select_thresholds
from schemas.job import JobConfig, JobError, parse_job
from schemas.thresholds import ClassThresholds, ThresholdTable


def f1_at(good: np.ndarray, anomalous: np.ndarray, threshold: float) -> float:
    found, false = (anomalous >= threshold).sum(), (good >= threshold).sum()
    return float(2 * found / (2 * found + false + (len(anomalous) - found)))


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_has_a_higher_f1(seed: int) -> None:
    generator = np.random.default_rng(seed)
    good, anomalous = generator.integers(0, 20, 30) / 20, generator.integers(5, 25, 12) / 20
    best = f1_at(good, anomalous, best_f1(good, anomalous))
    assert best == max(f1_at(good, anomalous, cut) for cut in np.linspace(0, 1.3, 1301))


def test_f1_by_hand() -> None:
    """At 0.6: both anomalous ones and one good one are called anomalous, F1 = 4 / 5; at 0.8, 2 / 3."""
    assert best_f1(np.array([0.1, 0.7]), np.array([0.6, 0.8])) == 0.6


@pytest.mark.parametrize(("rate", "passed"), [(0.0, 0), (0.09, 0), (0.1, 1), (0.3, 3), (1.0, 10)])
def test_the_rate_is_kept_and_used(rate: float, passed: int) -> None:
    good = np.arange(10, dtype=np.float32).astype(float) / 10
    assert (good >= false_positive_threshold(good, rate)).sum() == passed
    assert (np.full(10, 0.5) >= false_positive_threshold(np.full(10, 0.5), min(rate, 0.5))).sum() == 0


def test_a_class_by_hand() -> None:
    scores = ClassScores(good=[(0.1, 0.5), (0.7, 0.2)], anomalous=[(0.6, 0.6), (0.8, 0.9)])
    found = calibrate_class("nut", scores, "f1_max")
    assert (found.score, found.mask, found.good, found.anomalous) == (0.6, 0.6, 2, 2)
    assert (found.false_positive_rate, found.recall, found.f1) == (0.5, 1.0, pytest.approx(0.8))
    assert calibrate_class("nut", scores, "fpr=0.5").score == pytest.approx(0.1, abs=1e-6)


def test_what_cannot_be_calibrated_is_said() -> None:
    with pytest.raises(ThresholdError, match="'nut' has 1 good and 0 anomalous"):
        calibrate_class("nut", ClassScores(good=[(0.1, 0.1)]), "f1_max")
    with pytest.raises(ThresholdError, match="no good images"):
        calibrate_class("nut", ClassScores(anomalous=[(0.1, 0.1)]), "fpr=0.1")
    for policy in ("f1", "fpr", "fpr=2", "fpr=x"):
        with pytest.raises(ThresholdError, match="f1_max, or fpr=RATE"):
            check_policy(policy)


def job_for(*overrides: str) -> JobConfig:
    return parse_job({"dataset": {"images": "x"}, "output": {"uri": "y"}}, overrides)


@pytest.fixture
def table() -> ThresholdTable:
    return ThresholdTable(
        policy="f1_max",
        run_ids=("run",),
        model="alfa-small",
        weights_sha256="a" * 64,
        scoring=job_for().scoring_facts(),
        created_at=datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
        classes={"nut": ClassThresholds(score=0.4, mask=0.6, good=3, anomalous=2)},
    )


def test_a_table_reads_back_and_serves_the_job_it_was_made_for(table: ThresholdTable) -> None:
    again = parse_table(table.model_dump_json().encode(), "t.json")
    assert again == table
    job = job_for("engine.actors=3", "threshold.policy=labels", "threshold.table=t.json")
    assert select_thresholds(again, "t.json", job, "a" * 64, ["nut"]) == {"nut": Thresholds(0.4, 0.6)}


@pytest.mark.parametrize(
    ("overrides", "weights", "classes", "message"),
    [
        (["method.adaptation=none"], "a", ["nut"], "method.adaptation is mean in the table, none in the job"),
        (["model.image_size=480"], "a", ["nut"], "model.image_size is None in the table, 480 in the job"),
        (["references.images=train"], "a", ["nut"], "references is None in the table"),
        ([], "b", ["nut"], "weights of alfa-small"),
        ([], "a", ["nut", "pill"], "no thresholds for pill, only for nut"),
    ],
)
def test_a_table_of_another_model_or_method_is_refused(
    table: ThresholdTable, overrides: list[str], weights: str, classes: list[str], message: str
) -> None:
    with pytest.raises(ThresholdError, match=message):
        select_thresholds(table, "t.json", job_for(*overrides), weights * 64, classes)


@pytest.mark.parametrize("change", [{"schema_version": 9}, {"classes": {"nut": {}}}, {"surprise": 1}])
def test_a_file_that_is_no_table_is_refused(table: ThresholdTable, change: dict[str, Any]) -> None:
    broken = {**table.model_dump(mode="json"), **change}
    with pytest.raises(ThresholdError, match=r"t.json is not a valid table of thresholds"):
        parse_table(json.dumps(broken).encode(), "t.json")


def test_policy_labels_needs_its_table_and_its_content_makes_the_run() -> None:
    with pytest.raises(JobError, match="table is required with policy labels"):
        job_for("threshold.policy=labels")
    job = job_for("threshold.policy=labels", "threshold.table=t.json")
    assert job.threshold.source == "labels t.json"
    assert job.result_fingerprint("w", "p", thresholds="a") != job.result_fingerprint("w", "p", thresholds="b")
