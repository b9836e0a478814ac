"""Night over night: what is newly anomalous, whether scores drift, and how runs go. Pure but for the readers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from pipeline.lake import read_commit
from pipeline.storage import Store, paths
from schemas.tables import SCORES

PSI_THRESHOLD = 0.25
"""Convention for PSI: below 0.1 stable, to 0.25 to be watched, from there on shifted."""

P_VALUE = 0.01
"""Kolmogorov-Smirnov: from this p-value on, chance explains the difference. Small nights have a large PSI by chance."""

TREND_NIGHTS = 7
"""Nights in a trend, the compared one included."""

CHANGES = {"became": "was normal", "new": "new photo", "resolved": "normal again"}
"""What changed_images finds, in words."""

_BINS = 10
_SETUP = ("model", "weights_sha256", "prompt_fingerprint")
_COLUMNS = ("image_uri", "status", "score", "is_anomalous", *_SETUP)
_ROWS = pa.schema([("class_name", pa.string()), *((name, SCORES.field(name).type) for name in _COLUMNS)])

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ClassDrift:
    """A class in two nights; each pair is (before, after).

    ks: largest distance of the two empirical distribution functions of the scores, 0 to 1; p_value: the probability of
    at least this distance between samples of one distribution; psi: see psi(). None where a night has no scores of it.
    changed: which of model, weights and prompts differ, so that scores would differ of the same photos too.
    """

    class_name: str
    images: tuple[int, int]
    errors: tuple[int, int]
    anomalous: tuple[int, int]
    median: tuple[float | None, float | None]
    ks: float | None
    p_value: float | None
    psi: float | None
    changed: tuple[str, ...]
    drifted: bool

    @property
    def verdict(self) -> str:
        """In words; what has changed in the setup is not part of it."""
        if self.drifted:
            return "drifts"
        if not self.images[0]:
            return "new class"
        if not self.images[1]:
            return "no photos any more"
        return "steady" if self.psi is not None else "no scores to compare"


def published_nights(output: Store) -> list[str]:
    """The dates that have a commit, oldest first."""
    keys = [info.key for info in output.list("commits")]
    return sorted(key.removeprefix("commits/").removesuffix(".json") for key in keys if key.endswith(".json"))


def read_night(output: Store, run_date: str) -> pa.Table:
    """The rows of a night, from the files that its commit names: class_name, image_uri, status, score, is_anomalous,
    and what made the scores. Raises FileNotFoundError where the night is not published."""
    return _read_files(output, _published(output, run_date)["files"])


def read_classes(output: Store, before: str, after: str) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Two nights class by class, by name, as read_night has them: memory is that of the largest class. A table is empty
    where its night lacks the class. Raises FileNotFoundError where a night is not published."""
    files = [{entry["class_name"]: entry for entry in _published(output, night)["files"]} for night in (before, after)]
    for name in sorted({name for night in files for name in night}):
        old, new = (_read_files(output, [night[name]] if name in night else []) for night in files)
        yield old, new


def _published(output: Store, run_date: str) -> dict[str, Any]:
    commit = read_commit(output, run_date)
    if commit is None:
        raise FileNotFoundError(f"night {run_date} is not published at {output.uri('')}")
    return commit


def _read_files(output: Store, entries: Sequence[Mapping[str, Any]]) -> pa.Table:
    tables = []
    for entry in entries:
        table = pq.read_table(io.BytesIO(output.read(entry["key"])), columns=list(_COLUMNS))
        name = pa.repeat(pa.scalar(entry["class_name"], pa.string()), table.num_rows)
        tables.append(table.add_column(0, "class_name", name).replace_schema_metadata(None))
    return pa.concat_tables(tables) if tables else _ROWS.empty_table()


def read_trend(output: Store, nights: Sequence[str]) -> list[dict[str, Any]]:
    """For each published night in turn what its run's stats.json says of images, errors, anomalies and speed."""
    trend = []
    for night in nights:
        commit = read_commit(output, night)
        if commit is None:
            continue
        try:
            stats = json.loads(output.read(paths.run_key(commit["run_id"], "stats.json")))
        except FileNotFoundError:
            stats = {}
        errors = sum(sum(entry["errors"].values()) for entry in commit["files"])
        trend.append(
            {
                "run_date": night,
                "run_id": commit["run_id"],
                "images": commit["rows"],
                "error_rate": errors / commit["rows"] if commit["rows"] else 0.0,
                "anomalous": sum(entry["anomalies"] for entry in commit["files"]),
                # Runs of older versions have one rate, which counts from the start of Ray.
                "images_per_second": stats.get("scoring_images_per_second", stats.get("images_per_second")),
            }
        )
    return trend


def changed_images(before: pa.Table, after: pa.Table) -> pa.Table:
    """Images whose verdict is another than the night before, the highest score first.

    Columns class_name, image_uri, change, score_before, score_after. change: `became` (the photo was normal and is
    anomalous), `new` (anomalous, and not scored the night before), `resolved` (was anomalous and is normal). A photo
    that is no longer there has no verdict, and is not listed.
    """
    keys = ["class_name", "image_uri"]
    scored = [
        table.filter(pc.equal(table.column("status"), "ok")).select([*keys, "score", "is_anomalous"])
        for table in (before, after)
    ]
    both = scored[1].join(scored[0], keys, join_type="left outer", right_suffix="_before")
    was, now = both.column("is_anomalous_before"), both.column("is_anomalous")
    change = pc.case_when(
        pc.make_struct(
            pc.and_(pc.is_null(was), now),
            pc.fill_null(pc.and_(pc.invert(was), now), False),
            pc.fill_null(pc.and_(was, pc.invert(now)), False),
        ),
        "new",
        "became",
        "resolved",
    )
    found = both.append_column("change", change).filter(pc.is_valid(change))
    found = found.rename_columns([{"score": "score_after"}.get(name, name) for name in found.column_names])
    order = [("score_after", "descending"), ("class_name", "ascending"), ("image_uri", "ascending")]
    return found.select([*keys, "change", "score_before", "score_after"]).sort_by(order)


def drift(before: pa.Table, after: pa.Table, psi_threshold: float = PSI_THRESHOLD) -> list[ClassDrift]:
    """The classes of two nights, by name. One drifts where PSI reaches the threshold (it is a large shift) and the
    p-value of Kolmogorov-Smirnov stays below P_VALUE (it is not chance)."""
    names = sorted(
        {*pc.unique(before.column("class_name")).to_pylist(), *pc.unique(after.column("class_name")).to_pylist()}
    )
    return [_class_drift(name, before, after, psi_threshold) for name in names]


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


def _class_drift(name: str, before: pa.Table, after: pa.Table, psi_threshold: float) -> ClassDrift:
    tables = [table.filter(pc.equal(table.column("class_name"), name)) for table in (before, after)]
    first, second = (np.asarray(table.column("score").drop_null(), dtype=np.float64) for table in tables)
    ks = p_value = index = None
    if len(first) and len(second):
        test = ks_2samp(first, second)
        ks, p_value, index = float(test.statistic), float(test.pvalue), psi(first, second)
    setups = [[set(pc.unique(table.column(column)).to_pylist()) for column in _SETUP] for table in tables]
    both = all(table.num_rows for table in tables)
    return ClassDrift(
        name,
        images=(tables[0].num_rows, tables[1].num_rows),
        errors=(tables[0].num_rows - len(first), tables[1].num_rows - len(second)),
        anomalous=(_count(tables[0]), _count(tables[1])),
        median=(_median(first), _median(second)),
        ks=ks,
        p_value=p_value,
        psi=index,
        changed=tuple(
            label
            for label, old, new in zip(("model", "weights", "prompts"), *setups, strict=True)
            if both and old != new
        ),
        drifted=index is not None and p_value is not None and index >= psi_threshold and p_value < P_VALUE,
    )


def _count(table: pa.Table) -> int:
    return int(pc.sum(table.column("is_anomalous")).as_py() or 0)


def _median(scores: Floats) -> float | None:
    return float(np.median(scores)) if len(scores) else None
