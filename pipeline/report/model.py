"""What a report shows, as data: nothing here is markup."""

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
    """A class of the night. scores: of all its images without error, float32, descending. beyond: images beyond the
    fence of the class; None where they were not compared with each other."""

    name: str
    images: int
    anomalous: int
    errors: int
    threshold: float | None
    beyond: int | None
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class ListedImage:
    """A line of the list. score: null on error; error_type, error_message: null where there is a score."""

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

    photo: a JPEG, or None with photo_fault saying why. grid: anomaly map [gh, gw], float32, or None where the run's
    shard is gone. kept: for each prompt of the class whether adaptation left it; None where the shard does not say.
    mask_link: relative to the page. regions, explanation: as in schemas.tables.SCORES.
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
    """An image whose verdict is another than the night before. change: a key of nights.CHANGES. exhibit: its place in
    the gallery; None where the gallery lacks it."""

    class_name: str
    key: str
    change: str
    score_before: float | None
    score_after: float
    exhibit: int | None


@dataclass(frozen=True)
class Comparison:
    """The night beside the one before it; nothing but defaults where it is the first.

    before: date of the night before. images: the part that a page has room for; counts: all of them, by change.
    trend: the last nights, oldest first, as nights.read_trend has them. fault: why something of it is missing.
    """

    before: str | None = None
    classes: Sequence[ClassDrift] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    images: Sequence[ChangedImage] = ()
    trend: Sequence[Mapping[str, Any]] = ()
    fault: str | None = None


@dataclass(frozen=True, eq=False)
class Report:
    """A published night. images, failures and exhibits are the part of the night that a page has room for, the most
    anomalous first; classes and errors count all of it. stats: of the run; None where its folder lacks them."""

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
    """What the keys of all listed images are relative to."""
