"""Compares two nights: what is newly anomalous, and whether scores drift. Also reads the trend of the last nights.

Photos are matched by id, that is by address and version. A photo that was changed is another photo, so its verdict does
not count as changed. The addresses of a class are not kept, so that two nights of some million photos fit in memory.
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
"""By convention, a PSI below 0.1 means stable, below 0.25 worth watching, and from 0.25 on shifted."""

P_VALUE = 0.01
"""From this p-value of Kolmogorov-Smirnov on, chance may explain a shift: small nights have a large PSI by chance."""

TREND_NIGHTS = 7
"""Number of nights in a trend, including the compared one."""

CHANGES = {"became": "was normal", "new": "new photo", "resolved": "normal again"}
"""The kinds of changed verdicts that compare_class finds, and their names in reports."""

_BINS = 10
_SETUP = ("model", "weights_sha256", "prompt_fingerprint")
_COLUMNS = ("image_id", "score", "is_anomalous", *_SETUP)

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ClassNight:
    """A class in one night, in about 17 bytes per photo.

    entry: its file; None if the night does not have the class. photos: int64, hashes of the photos' ids, valid in this
    process only. scores: float32, NaN on error. anomalous: bool. setup: the models, weights and prompts that scored it.
    select: dataset.select of the night.
    """

    entry: CommitFile | None
    photos: NDArray[np.int64]
    scores: NDArray[np.float32]
    anomalous: NDArray[np.bool_]
    setup: Sequence[frozenset[str]]
    select: str

    @property
    def scored(self) -> NDArray[np.int64]:
        """The places (indices) of the photos that have a score."""
        return np.flatnonzero(~np.isnan(self.scores))


@dataclass(frozen=True)
class ClassDrift:
    """A class in two nights; each pair is (before, after).

    ks: largest distance between the two empirical distribution functions of the scores, 0 to 1. p_value: probability of
    at least this distance between samples of one distribution. psi: see psi(). All three are None if either night has
    no scores. common: number of photos with a score in both nights. changed: which of model, weights and prompts differ
    (then even the same photos get other scores). select: dataset.select of the night after.
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
        """Shares of the scored photos that are anomalous, 0 to 1; None without scored photos."""
        scored = [images - errors for images, errors in zip(self.images, self.errors, strict=True)]
        first, second = (part / whole if whole else None for part, whole in zip(self.anomalous, scored, strict=True))
        return first, second

    @property
    def is_of_other_photos(self) -> bool:
        """Whether most photos of the night after were not scored the night before.

        Then only rates and distributions can be compared, and not the verdicts of single photos.
        """
        return 2 * self.common < self.images[1] - self.errors[1]

    @property
    def verdict(self) -> str:
        """The result of the comparison in words; changes of the setup are not part of it."""
        if self.drifted:
            return "drifts"
        if not self.images[0]:
            return "new class"
        if not self.images[1]:
            return "no new photos" if self.select == "new" else "no photos any more"
        return "steady" if self.psi is not None else "no scores to compare"


def read_pairs(output: Store, before: str, after: str) -> Iterator[tuple[str, ClassNight, ClassNight]]:
    """Reads the classes of two nights, sorted by name. Raises FileNotFoundError if a night is not published."""
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
    """Reads images, errors, anomalies and speed of each published night, in the given order."""
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
    """The photos of a class whose verdict has changed since the night before, the highest score first.

    entry: the class's file of the night after. places: rows in that file. kinds: indices into CHANGES. before, after:
    scores, NaN if there is none.
    """

    entry: CommitFile | None
    places: NDArray[np.int64]
    kinds: NDArray[np.int64]
    before: NDArray[np.float32]
    after: NDArray[np.float32]

    def count(self) -> dict[str, int]:
        """Counts the photos of each kind of CHANGES."""
        return dict(zip(CHANGES, np.bincount(self.kinds, minlength=len(CHANGES)).tolist(), strict=True))

    def first(self, most: int, kinds: Sequence[str] = tuple(CHANGES)) -> Changes:
        """Returns the first `most` photos of these kinds."""
        chosen = np.flatnonzero(np.isin(self.kinds, [list(CHANGES).index(kind) for kind in kinds]))[:most]
        return replace(self, **{name: getattr(self, name)[chosen] for name in ("places", "kinds", "before", "after")})

    def read(self, output: Store, class_name: str) -> list[dict[str, Any]]:
        """Reads the photos as rows of class_name, image_uri, change, score_before and score_after."""
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
    """Compares a class in two nights: its distributions and rates, and the photos whose verdict has changed.

    A class drifts if PSI reaches the threshold (the shift is large) and the p-value of Kolmogorov-Smirnov is below
    P_VALUE (it is hardly chance). The changes are `became` (was normal, is anomalous), `new` (anomalous, not scored the
    night before) and `resolved` (was anomalous, is normal). If most photos are new since the night before, `new` is
    left out, because it would contain every anomalous photo.
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
    """Finds the place of each photo in a night; -1 if it has no score there."""
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
    """Computes the population stability index, the sum over bins of (q - p) ln(q / p).

    p and q are the shares of the scores of the night before and of the night after in a bin. The index is symmetric
    (Jeffreys' divergence), 0 for equal shares, and unbounded. The bins are the deciles of the night before; equal
    deciles form one bin. Half an image is added to each bin, so that empty bins have a logarithm. Neither night may be
    empty.
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
