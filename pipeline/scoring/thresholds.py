"""The thresholds of a run, by policy: fixed, from its own scores, from its references, or from a calibrated table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from pipeline.scoring.memories import read_memory
from pipeline.storage import Store
from schemas.job import JobConfig
from schemas.thresholds import ThresholdTable


@dataclass(frozen=True)
class Thresholds:
    """Thresholds: an image is anomalous from `score` on, and a pixel of its map from `mask` on."""

    score: float
    mask: float


class ThresholdError(ValueError):
    """Thresholds are missing or do not fit the job; the message says why and what to do."""


def fixed_thresholds(job: JobConfig) -> Thresholds | None:
    """Returns the thresholds of policy fixed; None for other policies, whose thresholds are set after scoring."""
    if job.threshold.policy != "fixed":
        return None
    value, mask_value = job.threshold.value, job.threshold.mask_value
    return Thresholds(value, value if mask_value is None else mask_value)


def quantile_thresholds(tables: Iterable[pa.Table], quantile: float) -> dict[str, Thresholds]:
    """Sets each class's threshold to a quantile (linear interpolation) of the scores of this run's images.

    The mask threshold is the same quantile of the maps' peaks, so that the share of images with a marked pixel equals
    the share called anomalous. tables: columns class_name, score, map_peak; null scores (errors) do not count.
    """
    scores: dict[str, list[npt.NDArray[np.float32]]] = {}
    for table in tables:
        scored = table.filter(pc.is_valid(table.column("score")))
        for class_name in scored.column("class_name").unique().to_pylist():
            rows = scored.filter(pc.equal(scored.column("class_name"), class_name))
            pairs = np.stack([rows.column(name).to_numpy() for name in ("score", "map_peak")], axis=1)
            scores.setdefault(class_name, []).append(pairs)
    cuts = {
        name: np.quantile(np.concatenate(pairs).astype(np.float64), quantile, axis=0) for name, pairs in scores.items()
    }
    return {name: Thresholds(float(cut[0]), float(cut[1])) for name, cut in cuts.items()}


def require_two(class_name: str, shots: int) -> None:
    """Raises ThresholdError if a class has fewer than two references, which cannot be scored against each other."""
    if shots < 2:
        raise ThresholdError(
            f"threshold.policy reference scores each reference image against the others, but class {class_name!r} has "
            f"{shots}; give it two or more (references.shots, references.images), or use another policy"
        )


def reference_thresholds(run_id: str, classes: Sequence[str], quantile: float, output: Store) -> dict[str, Thresholds]:
    """Sets each class's threshold to a quantile (linear interpolation) of its references' leave-one-out scores.

    The mask threshold is the same quantile of their map peaks (pipeline/alfa/README.md, "Few-shot"). Raises
    ThresholdError where a class has fewer than two references.
    """
    found = {}
    for name in classes:
        stored = read_memory(run_id, name, output)
        scores = np.empty((0, 2)) if stored is None else stored.scores.double().numpy()
        require_two(name, stored.references.shots if stored and stored.references else 0)
        cut = np.quantile(scores, quantile, axis=0)
        found[name] = Thresholds(float(cut[0]), float(cut[1]))
    return found


def parse_table(text: bytes, place: str) -> ThresholdTable:
    """Parses a table of thresholds. place: its address, for the message. Raises ThresholdError if it is invalid."""
    try:
        return ThresholdTable.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise ThresholdError(
            f"{place} is not a valid table of thresholds ({where}: {fault['msg']}); write one with alfa calibrate"
        ) from None


def select_thresholds(
    table: ThresholdTable, place: str, job: JobConfig, weights_sha256: str, classes: Sequence[str]
) -> dict[str, Thresholds]:
    """Selects the thresholds of the classes from a table. place: its address, for messages.

    Raises ThresholdError where the table was made with another model, weights or method than the job's, or lacks a
    class.
    """
    if table.weights_sha256 != weights_sha256:
        raise ThresholdError(
            f"{place} was calibrated with the weights of {table.model} (SHA-256 {table.weights_sha256[:12]}), but the "
            f"job has others ({weights_sha256[:12]}); run alfa calibrate again with the job's weights"
        )
    differences = list(_differences(table.scoring, job.scoring_facts()))
    if differences:
        raise ThresholdError(
            f"{place} was calibrated with other options than the job's, so its thresholds do not fit: "
            f"{'; '.join(differences)}; run alfa calibrate again with the job's options"
        )
    missing = [name for name in classes if name not in table.classes]
    if missing:
        known = ", ".join(table.classes) or "none"
        raise ThresholdError(
            f"{place} has no thresholds for {', '.join(missing)}, only for {known}; calibrate the missing classes too, "
            f"or leave them out of the job"
        )
    return {name: Thresholds(table.classes[name].score, table.classes[name].mask) for name in classes}


def _differences(table: Mapping[str, Any], job: Mapping[str, Any], path: str = "") -> list[str]:
    """Lists the options that differ, such as `method.adaptation is none in the table, mean in the job`."""
    found: list[str] = []
    for key in sorted({*table, *job}):
        there, here = table.get(key), job.get(key)
        name = f"{path}.{key}" if path else key
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            found += _differences(there, here, name)
        elif there != here:
            found.append(f"{name} is {there} in the table, {here} in the job")
    return found
