"""The table of thresholds by class that `alfa calibrate` writes and `threshold.table` of a job names."""

from __future__ import annotations

import datetime
from typing import Any, Literal

from pydantic import Field

from schemas.prompts import Frozen


class ClassThresholds(Frozen):
    """Thresholds of a class, and their results on the images from which they were set."""

    score: float = Field(description="score from which an image counts as anomalous")
    mask: float = Field(description="map value from which a pixel counts as anomalous")
    good: int = Field(ge=0, description="good images that they were set by")
    anomalous: int = Field(ge=0, description="anomalous images that they were set by")
    false_positive_rate: float | None = Field(None, ge=0, le=1, description="share of the good ones called anomalous")
    recall: float | None = Field(None, ge=0, le=1, description="share of the anomalous ones called anomalous")
    f1: float | None = Field(None, ge=0, le=1)


class ThresholdTable(Frozen):
    """The whole table: a small JSON object that people may read and edit."""

    schema_version: Literal[1] = 1
    policy: str = Field(description="f1_max, or fpr=RATE")
    run_ids: tuple[str, ...] = Field(min_length=1, description="runs whose scores they were set by")
    model: str = Field(description="open_clip model and pretrained tag or file name")
    weights_sha256: str = Field(description="SHA-256 of the weights file")
    scoring: dict[str, Any] = Field(description="the options that the scores depend on: model, method, references")
    created_at: datetime.datetime
    classes: dict[str, ClassThresholds]
