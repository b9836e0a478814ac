"""Thresholds that do not follow from a run's own scores: from its references, or from a calibrated table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError

from pipeline.references import read_memory
from pipeline.scoring import Thresholds
from pipeline.storage import Store
from schemas.job import JobConfig
from schemas.thresholds import ThresholdTable


class ThresholdError(ValueError):
    """Thresholds cannot be had, or do not belong to the job; the message says why and what to do."""


def require_two(class_name: str, shots: int) -> None:
    """Raises ThresholdError where no reference image can be held against another."""
    if shots < 2:
        raise ThresholdError(
            f"threshold.policy reference scores each reference image against the others, but class {class_name!r} has "
            f"{shots}; give it two or more (references.shots, references.images), or take another policy"
        )


def reference_thresholds(run_id: str, classes: Sequence[str], quantile: float, output: Store) -> dict[str, Thresholds]:
    """Per class, the quantile (linear interpolation) of the references' leave-one-out scores, and that of their map
    peaks for masks (method.md, "Few-shot"). Raises ThresholdError where a class has fewer than two references."""
    found = {}
    for name in classes:
        stored = read_memory(run_id, name, output)
        scores = np.empty((0, 2)) if stored is None else stored.scores.double().numpy()
        require_two(name, 0 if stored is None else stored.memory.shots)
        cut = np.quantile(scores, quantile, axis=0)
        found[name] = Thresholds(float(cut[0]), float(cut[1]))
    return found


def parse_table(text: bytes, place: str) -> ThresholdTable:
    """The table in a JSON text; place: its address, for the message of the ThresholdError where it is none."""
    try:
        return ThresholdTable.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise ThresholdError(
            f"{place} is no table of thresholds ({where}: {fault['msg']}); write one: alfa calibrate"
        ) from None


def select_thresholds(
    table: ThresholdTable, place: str, job: JobConfig, weights_sha256: str, classes: Sequence[str]
) -> dict[str, Thresholds]:
    """The thresholds of the classes. Raises ThresholdError where the table was made with another model, other weights
    or another method than the job's, or lacks a class."""
    if table.weights_sha256 != weights_sha256:
        raise ThresholdError(
            f"{place} was calibrated with the weights of {table.model} (SHA-256 {table.weights_sha256[:12]}), the job "
            f"has others ({weights_sha256[:12]}); calibrate again with the job's: alfa calibrate"
        )
    differences = list(_differences(table.scoring, job.scoring_facts()))
    if differences:
        raise ThresholdError(
            f"{place} was calibrated with other options than the job's, so its thresholds mean nothing here: "
            f"{'; '.join(differences)}; calibrate again with the job's: alfa calibrate"
        )
    missing = [name for name in classes if name not in table.classes]
    if missing:
        known = ", ".join(table.classes) or "none"
        raise ThresholdError(
            f"{place} has no thresholds of {', '.join(missing)} (it has {known}); calibrate them too, or leave them out"
        )
    return {name: Thresholds(table.classes[name].score, table.classes[name].mask) for name in classes}


def _differences(table: Mapping[str, Any], job: Mapping[str, Any], path: str = "") -> list[str]:
    """`method.adaptation is none there, mean here`, for each key."""
    found: list[str] = []
    for key in sorted({*table, *job}):
        there, here = table.get(key), job.get(key)
        name = f"{path}.{key}" if path else key
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            found += _differences(there, here, name)
        elif there != here:
            found.append(f"{name} is {there} there, {here} here")
    return found
