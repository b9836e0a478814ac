"""Night over night: what is newly anomalous, whether scores drift, and how runs go. Pure but for the readers.

A photo is one by its id, so by address and version: what was changed since is another photo, and a verdict on it is not
a changed one. A class is held without its addresses, so that two nights of some million photos fit in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from pipeline.lake import read_commit, read_groups, read_stats, take_rows
from pipeline.storage import Store
from schemas.records import Commit, CommitFile

PSI_THRESHOLD = 0.25
"""Convention for PSI: below 0.1 stable, to 0.25 to be watched, from there on shifted."""

P_VALUE = 0.01
"""Kolmogorov-Smirnov: from this p-value on, chance explains the difference. Small nights have a large PSI by chance."""

TREND_NIGHTS = 7
"""Nights in a trend, the compared one included."""

CHANGES = {"became": "was normal", "new": "new photo", "resolved": "normal again"}
"""What compare_class finds of single photos, in words."""

_BINS = 10
_SETUP = ("model", "weights_sha256", "prompt_fingerprint")
_COLUMNS = ("image_id", "score", "is_anomalous", *_SETUP)

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ClassNight:
    """A class in one night, without what is long: some 17 bytes a photo.

    photos: int64, hashes of their ids, which differ from process to process; scores: float32, NaN on error;
    anomalous: bool; setup: the models, weights and prompts that scored it. entry: its file; None where there is none.
    select: the night's dataset.select.
    """

    entry: CommitFile | None
    photos: NDArray[np.int64]
    scores: NDArray[np.float32]
    anomalous: NDArray[np.bool_]
    setup: Sequence[frozenset[str]]
    select: str

    @property
    def scored(self) -> NDArray[np.int64]:
        """The places of the photos that have a score."""
        return np.flatnonzero(~np.isnan(self.scores))


@dataclass(frozen=True)
class ClassDrift:
    """A class in two nights; each pair is (before, after).

    ks: largest distance of the two empirical distribution functions of the scores, 0 to 1; p_value: the probability of
    at least this distance between samples of one distribution; psi: see psi(). None where a night has no scores of it.
    common: photos that have a score in both. changed: which of model, weights and prompts differ, so that scores would
    differ of the same photos too. select: dataset.select of the night after.
    """

    class_name: str
    images: tuple[int, int]
    errors: tuple[int, int]
    anomalous: tuple[int, int]
    common: int
    median: tuple[float | None, float | None]
    ks: float | None
    p_value: float | None
    psi: float | None
    changed: tuple[str, ...]
    drifted: bool
    select: str

    @property
    def rates(self) -> tuple[float | None, float | None]:
        """Share of the scored photos that are anomalous, 0 to 1."""
        scored = [images - errors for images, errors in zip(self.images, self.errors, strict=True)]
        first, second = (part / whole if whole else None for part, whole in zip(self.anomalous, scored, strict=True))
        return first, second

    @property
    def is_of_other_photos(self) -> bool:
        """Whether most photos of the night after were not scored the night before, so that verdicts of single photos
        say nothing of what has changed; rates and distributions do."""
        return 2 * self.common < self.images[1] - self.errors[1]

    @property
    def verdict(self) -> str:
        """In words; what has changed in the setup is not part of it."""
        if self.drifted:
            return "drifts"
        if not self.images[0]:
            return "new class"
        if not self.images[1]:
            return "no new photos" if self.select == "new" else "no photos any more"
        return "steady" if self.psi is not None else "no scores to compare"


def read_pairs(output: Store, before: str, after: str) -> Iterator[tuple[str, ClassNight, ClassNight]]:
    """The classes of two nights, by name. Raises FileNotFoundError where a night is not published."""
    commits = [_published(output, night) for night in (before, after)]
    files = [{entry.class_name: entry for entry in commit.files} for commit in commits]
    selects = [commit.select for commit in commits]
    for name in sorted({name for night in files for name in night}):
        old, new = (_read_class(output, night.get(name), how) for night, how in zip(files, selects, strict=True))
        yield name, old, new


def _published(output: Store, run_date: str) -> Commit:
    commit = read_commit(output, run_date)
    if commit is None:
        raise FileNotFoundError(f"night {run_date} is not published at {output.uri('')}")
    return commit


def _read_class(output: Store, entry: CommitFile | None, select: str) -> ClassNight:
    photos, scores, anomalous = ([np.empty(0, kind)] for kind in (np.int64, np.float32, np.bool_))
    setup: list[set[str]] = [set() for _ in _SETUP]
    for rows in read_groups(output, entry, _COLUMNS) if entry is not None else ():
        ids = rows.column("image_id").to_pylist()
        photos.append(np.fromiter(map(hash, ids), np.int64, len(ids)))
        scores.append(rows.column("score").to_numpy())
        anomalous.append(rows.column("is_anomalous").fill_null(False).to_numpy())
        for found, name in zip(setup, _SETUP, strict=True):
            found.update(pc.unique(rows.column(name)).to_pylist())
    return ClassNight(
        entry,
        np.concatenate(photos),
        np.concatenate(scores),
        np.concatenate(anomalous),
        [frozenset(found) for found in setup],
        select,
    )


def read_trend(output: Store, nights: Sequence[str]) -> list[dict[str, Any]]:
    """For each published night in turn what its run's stats.json says of images, errors, anomalies and speed."""
    trend = []
    for night in nights:
        commit = read_commit(output, night)
        if commit is None:
            continue
        stats = read_stats(output, commit.run_id)
        trend.append(
            {
                "run_date": night,
                "run_id": commit.run_id,
                "images": commit.rows,
                "error_rate": commit.failed / commit.rows if commit.rows else 0.0,
                "anomalous": sum(commit.anomalies.values()),
                "images_per_second": None if stats is None else stats.rate,
            }
        )
    return trend


@dataclass(frozen=True, eq=False)
class Changes:
    """Photos with another verdict than the night before, the highest score first.

    entry: the class's file of the night after; places: in it. kinds: places in CHANGES. before, after: scores, NaN
    where there was none.
    """

    entry: CommitFile | None
    places: NDArray[np.int64]
    kinds: NDArray[np.int64]
    before: NDArray[np.float32]
    after: NDArray[np.float32]

    def count(self) -> dict[str, int]:
        """How many there are of each of CHANGES."""
        return dict(zip(CHANGES, np.bincount(self.kinds, minlength=len(CHANGES)).tolist(), strict=True))

    def first(self, most: int, kinds: Sequence[str] = tuple(CHANGES)) -> Changes:
        """At most so many of them, of these kinds."""
        chosen = np.flatnonzero(np.isin(self.kinds, [list(CHANGES).index(kind) for kind in kinds]))[:most]
        return replace(self, **{name: getattr(self, name)[chosen] for name in ("places", "kinds", "before", "after")})

    def read(self, output: Store, class_name: str) -> list[dict[str, Any]]:
        """Rows class_name, image_uri, change, score_before, score_after."""
        if self.entry is None or not len(self.places):
            return []
        uris = take_rows(output, self.entry, self.places, ["image_uri"]).column("image_uri").to_pylist()
        return [
            {
                "class_name": class_name,
                "image_uri": uri,
                "change": list(CHANGES)[kind],
                "score_before": None if np.isnan(before) else before,
                "score_after": after,
            }
            for uri, kind, before, after in zip(
                uris, self.kinds.tolist(), self.before.tolist(), self.after.tolist(), strict=True
            )
        ]


def compare_class(
    name: str, before: ClassNight, after: ClassNight, psi_threshold: float = PSI_THRESHOLD
) -> tuple[ClassDrift, Changes]:
    """A class night over night: its distributions and rates, and the photos whose verdict is another.

    It drifts where PSI reaches the threshold (the shift is large) and the p-value of Kolmogorov-Smirnov stays below
    P_VALUE (it is not chance). Changes are `became` (the photo was normal and is anomalous), `new` (anomalous, and not
    scored the night before) and `resolved` (was anomalous and is normal). Where most photos are others than the night
    before, `new` would be all that is anomalous, so those are left out.
    """
    places = after.scored
    earlier = _find(after.photos[places], before)
    found, now = earlier >= 0, after.anomalous[places]
    drift = _drift(name, before, after, int(found.sum()), psi_threshold)
    was, scores = np.zeros(len(places), np.bool_), np.full(len(places), np.nan, np.float32)
    was[found], scores[found] = before.anomalous[earlier[found]], before.scores[earlier[found]]
    is_new = ~found & (not drift.is_of_other_photos)
    kinds = np.select([found & ~was & now, is_new & now, was & ~now], range(len(CHANGES)), -1)
    chosen = np.flatnonzero(kinds >= 0)
    chosen = chosen[np.argsort(-after.scores[places[chosen]], kind="stable")]
    places = places[chosen]
    return drift, Changes(after.entry, places, kinds[chosen], scores[chosen], after.scores[places])


def _find(photos: NDArray[np.int64], night: ClassNight) -> NDArray[np.int64]:
    """The place in a night of each photo, -1 where it has no score there."""
    places = night.scored
    places = places[np.argsort(night.photos[places], kind="stable")]
    known = night.photos[places]
    spots = np.searchsorted(known, photos)
    found = np.full(len(photos), -1, np.int64)
    inside = np.flatnonzero(spots < len(known))
    hits = inside[known[spots[inside]] == photos[inside]]
    found[hits] = places[spots[hits]]
    return found


def psi(before: Floats, after: Floats) -> float:
    """Population stability index: sum over bins of (q - p) ln(q / p), where p and q are the shares of the scores of the
    night before and of the night after. Symmetric (Jeffreys' divergence), 0 for equal shares, unbounded.

    The bins are the deciles of the night before; equal deciles form one bin. Half an image is added to each bin, so
    that an empty one has a logarithm. Both nights must have scores.
    """
    edges = np.unique(np.quantile(before, np.arange(1, _BINS) / _BINS))
    p, q = (_shares(scores, edges) for scores in (before, after))
    return float(np.sum((q - p) * np.log(q / p)))


def _shares(scores: Floats, edges: Floats) -> Floats:
    counts = np.bincount(np.searchsorted(edges, scores, side="right"), minlength=len(edges) + 1) + 0.5
    return np.asarray(counts / counts.sum(), dtype=np.float64)


def _drift(name: str, before: ClassNight, after: ClassNight, common: int, psi_threshold: float) -> ClassDrift:
    nights = (before, after)
    first, second = (night.scores[night.scored].astype(np.float64) for night in nights)
    ks = p_value = index = None
    if len(first) and len(second):
        test = ks_2samp(first, second)
        ks, p_value, index = float(test.statistic), float(test.pvalue), psi(first, second)
    both = all(len(night.photos) for night in nights)
    return ClassDrift(
        name,
        images=(len(before.photos), len(after.photos)),
        errors=(len(before.photos) - len(first), len(after.photos) - len(second)),
        anomalous=(int(before.anomalous.sum()), int(after.anomalous.sum())),
        common=common,
        median=(_median(first), _median(second)),
        ks=ks,
        p_value=p_value,
        psi=index,
        changed=tuple(
            label
            for label, old, new in zip(("model", "weights", "prompts"), before.setup, after.setup, strict=True)
            if both and old != new
        ),
        drifted=index is not None and p_value is not None and index >= psi_threshold and p_value < P_VALUE,
        select=after.select,
    )


def _median(scores: Floats) -> float | None:
    return float(np.median(scores)) if len(scores) else None
