"""Calibrates the thresholds of each class from the scores of finished runs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.images import GOOD
from pipeline.scoring import ThresholdError
from pipeline.storage import Store, paths, read_shard
from schemas.thresholds import ClassThresholds


@dataclass(frozen=True)
class ClassScores:
    """The scores of a class's labelled images, as pairs of score and highest map value."""

    good: list[tuple[float, float]] = field(default_factory=list)
    anomalous: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class RunScores:
    """The scores of a run by class. model, weights_sha256: as in its rows."""

    model: str
    weights_sha256: str
    classes: dict[str, ClassScores]


def read_scores(output: Store, run_id: str, *, all_good: bool) -> RunScores:
    """Reads the scores of a run's labelled images. all_good: count every image as good, whatever its label.

    Raises ThresholdError if the run does not exist, or has no labelled image.
    """
    labels: dict[str, str | None] = {}
    for info in output.list(f"runs/{run_id}"):
        name = info.key.removeprefix(f"runs/{run_id}/")
        if name.startswith("manifest-") and name.endswith(".parquet"):
            columns = pq.read_table(io.BytesIO(output.read(info.key)), columns=["image_id", "label"]).to_pydict()
            labels |= dict(zip(columns["image_id"], columns["label"], strict=True))
    classes: dict[str, ClassScores] = {}
    model, weights = "", ""
    seen: set[str] = set()  # if images were added to a run, some may be in two shards
    folder = paths.run_key(run_id, "shards")
    columns_read = ["image_id", "class_name", "score", "map_peak", "model", "weights_sha256"]
    for shard_id in sorted(paths.finished_shards(output, folder)):
        for row in read_shard(output, folder, shard_id, columns_read).to_pylist():
            label = GOOD if all_good else labels.get(row["image_id"])
            model, weights = row["model"], row["weights_sha256"]
            if row["score"] is None or label is None or row["image_id"] in seen:
                continue
            seen.add(row["image_id"])
            scores = classes.setdefault(row["class_name"], ClassScores())
            (scores.good if label == GOOD else scores.anomalous).append((row["score"], row["map_peak"]))
    where = output.uri(f"runs/{run_id}")
    if not model:
        raise ThresholdError(f"{where} has no finished shard; `alfa status` lists the runs")
    if not classes:
        raise ThresholdError(
            f"no scored image of {where} has a label; score a labelled dataset (layouts mvtec, visa, or a table with "
            f"label), or score known-good images and use --all-good"
        )
    return RunScores(model, weights, classes)


def calibrate_class(class_name: str, scores: ClassScores, policy: str) -> ClassThresholds:
    """Sets the thresholds of a class by policy `f1_max` or `fpr=RATE`.

    The mask threshold is set in the same way from the maps' peaks, so that the policy holds for the images with a
    marked pixel. Raises ThresholdError if there are too few images for the policy.
    """
    good, anomalous = np.array(scores.good).reshape(-1, 2), np.array(scores.anomalous).reshape(-1, 2)
    if policy == "f1_max":
        if not (len(good) and len(anomalous)):
            raise ThresholdError(
                f"class {class_name!r} has {len(good)} good and {len(anomalous)} anomalous images; f1_max needs both. "
                f"With good images only, use --by fpr=0.01"
            )
        score, mask = (best_f1(good[:, part], anomalous[:, part]) for part in (0, 1))
    else:
        rate = float(policy.removeprefix("fpr="))
        if not len(good):
            raise ThresholdError(f"class {class_name!r} has no good images, which a false-positive rate needs")
        score, mask = (false_positive_threshold(good[:, part], rate) for part in (0, 1))
    false, found = int((good[:, 0] >= score).sum()), int((anomalous[:, 0] >= score).sum())
    return ClassThresholds(
        score=score,
        mask=mask,
        good=len(good),
        anomalous=len(anomalous),
        false_positive_rate=false / len(good) if len(good) else None,
        recall=found / len(anomalous) if len(anomalous) else None,
        f1=2 * found / (found + false + len(anomalous)) if len(anomalous) else None,
    )


def best_f1(good: NDArray[np.float64], anomalous: NDArray[np.float64]) -> float:
    """Returns the threshold t at which `score >= t` has the highest F1; among equal ones, the highest t.

    F1 = 2 TP / (TP + FP + P). good, anomalous: scores [n], not empty.
    """
    cuts = np.unique(np.concatenate([good, anomalous]))[::-1]
    found = len(anomalous) - np.searchsorted(np.sort(anomalous), cuts, side="left")
    false = len(good) - np.searchsorted(np.sort(good), cuts, side="left")
    return float(cuts[np.argmax(2 * found / (found + false + len(anomalous)))])


def false_positive_threshold(good: NDArray[np.float64], rate: float) -> float:
    """Returns the lowest float32 t at which at most a share `rate` of the good images has `score >= t`.

    good: scores [n], not empty.
    """
    allowed = int(np.floor(rate * len(good) + 1e-9))
    if allowed >= len(good):
        return float(good.min())
    highest_passed = np.float32(np.sort(good)[::-1][allowed])
    return float(np.nextafter(highest_passed, np.float32(np.inf)))


def check_policy(policy: str) -> str:
    """Returns the policy unchanged. Raises ThresholdError if it is neither f1_max nor fpr=RATE."""
    name, _, rate = policy.partition("=")
    try:
        known = policy == "f1_max" or (name == "fpr" and 0 <= float(rate) <= 1)
    except ValueError:
        known = False
    if not known:
        raise ThresholdError(f"--by {policy}: write f1_max, or fpr=RATE with a rate from 0 to 1, such as fpr=0.01")
    return policy


def merge_scores(runs: Sequence[RunScores]) -> dict[str, ClassScores]:
    """Merges the scores of several runs, by class in alphabetical order."""
    merged: dict[str, ClassScores] = {}
    for run in runs:
        for name, scores in run.classes.items():
            both = merged.setdefault(name, ClassScores())
            both.good.extend(scores.good)
            both.anomalous.extend(scores.anomalous)
    return dict(sorted(merged.items()))
