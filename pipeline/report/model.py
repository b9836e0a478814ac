"""The content of a report as plain data, without markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.drift import ClassDrift
from schemas.job import JobConfig
from schemas.prompts import UsedPrompts
from schemas.records import Commit, RunStats


@dataclass(frozen=True, eq=False)
class ClassFacts:
    """A class of the night.

    scores: of all its images without error, float32, descending. beyond: number of images beyond the fence of the
    class; None if they were not compared with peers.
    """

    name: str
    images: int
    anomalous: int
    errors: int
    threshold: float | None
    beyond: int | None
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class ListedImage:
    """A line of the list. score: None on error. error_type, error_message: None if there is a score."""

    image_id: str
    class_name: str
    key: str
    score: float | None = None
    is_anomalous: bool = False
    defect: str | None = None
    error_type: str | None = None
    error_message: str | None = None


@dataclass(frozen=True, eq=False)
class Exhibit:
    """An image of the gallery.

    photo: a JPEG, or None; photo_fault then says why. grid: anomaly map [gh, gw], float32; None if the shard is
    missing. kept: for each prompt of the class, whether adaptation has kept it; None if unknown. mask_link: relative to
    the page. regions, explanation: as in schemas.tables.SCORES.
    """

    image: ListedImage
    uri: str
    width: int
    height: int
    score_global: float
    score_local: float
    threshold: float
    mask_threshold: float
    mask_area: float
    mask_link: str | None
    regions: Sequence[Mapping[str, Any]]
    explanation: Sequence[Mapping[str, Any]]
    photo: bytes | None
    photo_fault: str | None
    grid: NDArray[np.float32] | None
    kept: Sequence[bool] | None


@dataclass(frozen=True)
class ChangedImage:
    """An image whose verdict has changed since the night before.

    change: a key of drift.CHANGES. exhibit: its index in the gallery; None if it is not there.
    """

    class_name: str
    key: str
    change: str
    score_before: float | None
    score_after: float
    exhibit: int | None


@dataclass(frozen=True)
class Comparison:
    """The comparison with the night before. For the first night, all fields have their defaults.

    before: date of the night before. images: as many changed images as are listed. counts: number of all changed
    images, by change. trend: the last nights, the oldest first, from drift.read_trend. fault: why a part is missing.
    """

    before: str | None = None
    classes: Sequence[ClassDrift] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    images: Sequence[ChangedImage] = ()
    trend: Sequence[Mapping[str, Any]] = ()
    fault: str | None = None


@dataclass(frozen=True, eq=False)
class Report:
    """A published night.

    images, failures, exhibits: as many as are shown, the most anomalous first. classes, errors: counts of the whole
    night. stats: of the run; None if its folder lacks them.
    """

    job: JobConfig
    commit: Commit
    stats: RunStats | None
    classes: Sequence[ClassFacts]
    errors: Mapping[str, int]
    images: Sequence[ListedImage]
    failures: Sequence[ListedImage]
    exhibits: Sequence[Exhibit]
    comparison: Comparison
    prompts: Sequence[UsedPrompts]
    model: str
    weights_sha256: str
    root: str
    """The folder to which the keys of all listed images are relative."""
