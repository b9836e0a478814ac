"""Loads what a report shows from a night's commit, tables and run folder.

Memory holds the scores of one class at a time, and what is shown.
"""

from __future__ import annotations

import logging
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.images import Span, depth_span
from pipeline.lake import find_night_before, published_nights, read_groups, read_stats, take_rows
from pipeline.report import drift
from pipeline.report.model import ChangedImage, ClassFacts, Comparison, Exhibit, ListedImage, Report
from pipeline.report.photos import Photos
from pipeline.storage import Run, Store, open_store, paths, read_shard, redact
from schemas.job import JobConfig, parse_job, read_job_yaml
from schemas.prompts import RunPrompts, UsedPrompts
from schemas.records import Commit, CommitFile
from schemas.text import one_line

MOST_IMAGES = 10_000
"""Largest number of images in the list."""
MOST_FAILURES = 500
"""Largest number of errors that are listed; all are counted."""
MOST_EXHIBITS = 200
"""Largest number of images in the gallery."""
MOST_PATCHES = 64
"""Largest number of rows and columns of a map in the page; larger maps are made coarser, and keep their peaks."""
MOST_CHANGES = 50
"""Largest number of changed verdicts that are listed; all are counted."""

logger = logging.getLogger(__name__)

_THREADS = 8
_LONGEST_KEY = 240

Row = dict[str, Any]


class ReportError(ValueError):
    """A report cannot be made; the message says what is missing."""


def load_report(output: Store, commit: Commit) -> Report:
    """Loads everything that the report of a published night shows.

    Missing photos and shards leave gaps, which the report names. Raises ReportError if the run's folder lacks its job.
    """
    run_id = commit.run_id
    job = _read_job(output, run_id)
    entries = commit.files
    counts = [entry.rows - entry.failed for entry in entries]
    wanted = zip(
        entries,
        fair_shares(counts, MOST_IMAGES),
        fair_shares(counts, MOST_EXHIBITS),
        fair_shares([entry.failed for entry in entries], MOST_FAILURES),
        strict=True,
    )
    parts = [_read_class(output, *part) for part in wanted]
    rows = [row for part in parts for row in part.rows]
    failed = [row for part in parts for row in part.failures]
    shown = _by_rank([part.rows[: part.exhibits] for part in parts])
    root = _common_root([row["image_uri"] for row in [*rows, *failed]])
    first = next(iter([*rows, *failed]), {"model": "", "weights_sha256": ""})
    return Report(
        job=job,
        commit=commit,
        stats=read_stats(output, run_id),
        classes=[part.facts for part in parts],
        errors=commit.errors,
        images=[_listed(row, root) for row in _by_rank([part.rows for part in parts])],
        failures=[_listed(row, root) for row in failed],
        exhibits=_exhibits(shown, root, Run(run_id, job, "", ""), commit, output),
        comparison=_compare(output, str(commit.run_date), root, shown),
        prompts=_read_prompts(output, run_id),
        model=first["model"],
        weights_sha256=first["weights_sha256"],
        root=root,
    )


def fair_shares(sizes: Sequence[int], total: int) -> list[int]:
    """Returns how many to take from each group, at most `total` in all, as equally as the sizes of the groups allow."""
    shares = [0] * len(sizes)
    left = total
    for rank, group in enumerate(sorted(range(len(sizes)), key=lambda place: sizes[place])):
        shares[group] = min(sizes[group], left // (len(sizes) - rank))
        left -= shares[group]
    return shares


def shrink_map(values: Sequence[float], width: int) -> NDArray[np.float32]:
    """Returns a map, given row by row, as [gh, gw]; at most MOST_PATCHES per side.

    The large maps of tiled photos are made coarser, so that a page can hold the maps of all its images. Each coarse
    patch has the highest value of its part of the map.
    """
    grid = np.asarray(values, np.float32).reshape(-1, width)
    step = -(-max(grid.shape) // MOST_PATCHES)
    if step == 1:
        return grid
    rows, columns = (-(-side // step) for side in grid.shape)
    padded = np.full((rows * step, columns * step), -np.inf, dtype=np.float32)
    padded[: grid.shape[0], : grid.shape[1]] = grid
    peaks: NDArray[np.float32] = padded.reshape(rows, step, columns, step).max(axis=(1, 3))
    return peaks


@dataclass(frozen=True)
class _ClassPart:
    facts: ClassFacts
    rows: list[Row]
    failures: list[Row]
    exhibits: int


def _read_class(output: Store, entry: CommitFile, images: int, exhibits: int, failures: int) -> _ClassPart:
    """Reads the counts of a class and its most anomalous rows. Of the other rows, only the scores are read."""
    name = entry.class_name
    groups = read_groups(output, entry, ["score"])
    scores = np.concatenate([np.empty(0, np.float32), *(group.column("score").to_numpy() for group in groups)])
    order = np.argsort(-scores, kind="stable")  # errors have NaN, which comes last
    scored = len(scores) - int(np.isnan(scores).sum())
    rows, failed = (
        [{**row, "class_name": name} for row in take_rows(output, entry, places).to_pylist()]
        for places in (order[: min(images, scored)], order[scored:][:failures])
    )
    facts = ClassFacts(
        name=name,
        images=entry.rows,
        anomalous=entry.anomalies,
        beyond=entry.beyond if entry.compared else None,
        errors=len(scores) - scored,
        threshold=rows[0]["threshold"] if rows else None,
        scores=scores[order[:scored]],
    )
    return _ClassPart(facts, rows, failed, exhibits)


def _by_rank(groups: Iterable[Sequence[Row]], score: str = "score") -> list[Row]:
    """Orders rows by rank within their class: the most anomalous of each class, then the second of each, and so on.

    Raw scores of different classes cannot be compared.
    """
    ranked = [(rank, -row[score], row["class_name"], row) for group in groups for rank, row in enumerate(group)]
    return [row for *_, row in sorted(ranked, key=lambda item: item[:3])]


def _listed(row: Row, root: str) -> ListedImage:
    regions = row["regions"] or []
    return ListedImage(
        image_id=row["image_id"],
        class_name=row["class_name"],
        key=_clip(row["image_uri"][len(root) :]),
        score=row["score"],
        is_anomalous=bool(row["is_anomalous"]),
        defect=one_line(regions[0]["defect"] or "") or None if regions else None,
        error_type=row["error_type"],
        error_message=None if row["error_message"] is None else _clip(row["error_message"], 2 * _LONGEST_KEY),
    )


def _exhibits(rows: Sequence[Row], root: str, run: Run, commit: Commit, output: Store) -> list[Exhibit]:
    """Makes the images of the gallery."""
    job, masks = run.job, not commit.cleared_at
    photos = Photos(open_store(job.dataset.images, job.storage), job.dataset.max_pixels)
    spans = {entry.class_name: Span(*entry.span) for entry in commit.files if entry.span is not None}
    fixed = None if job.dataset.bit_depth is None else depth_span(job.dataset.bit_depth)
    page = posixpath.dirname(paths.report_key(run.run_id))
    with ThreadPoolExecutor(_THREADS, "report") as pool:
        pictures = pool.map(lambda row: photos.thumbnail(row["image_uri"], fixed or spans.get(row["class_name"])), rows)
        details = _read_details(rows, run, output, pool)
        exhibits = []
        for row, (photo, fault) in zip(rows, pictures, strict=True):
            found = details.get(row["image_id"], {})
            grid = found.get("grid")
            key = output.key_of(row["mask_uri"]) if masks and row["mask_uri"] else None
            exhibits.append(
                Exhibit(
                    image=_listed(row, root),
                    uri=_clip(row["image_uri"], 4 * _LONGEST_KEY),
                    mask_link=None if key is None else quote(posixpath.relpath(key, page)),
                    regions=[_region(region, root) for region in row["regions"] or []],
                    explanation=row["explanation"] or [],
                    photo=photo,
                    photo_fault=fault,
                    grid=None if grid is None else shrink_map(grid, found["grid_width"]),
                    kept=found.get("prompts_kept"),
                    **{name: row[name] for name in _EXHIBIT_COLUMNS},
                )
            )
    return exhibits


def _region(region: Row, root: str) -> Row:
    peer = region.get("peer_uri")  # missing in nights of earlier versions
    return {
        **region,
        "defect": one_line(region["defect"] or ""),
        "peer": None if peer is None else _clip(peer.removeprefix(root)),
    }


_EXHIBIT_COLUMNS = ("width", "height", "score_global", "score_local", "threshold", "mask_threshold", "mask_area")
"""Columns that are copied from a row into its Exhibit."""
_SHARD_COLUMNS = ("image_id", "grid", "grid_width", "prompts_kept")
"""Columns that are read from shards, because the table does not have them."""


def _read_details(rows: Sequence[Row], run: Run, output: Store, pool: ThreadPoolExecutor) -> dict[str, Row]:
    """Reads _SHARD_COLUMNS of the rows from their shards, by image id. Rows of missing shards are left out."""
    wanted: dict[str, list[str]] = {}
    for row in rows:
        wanted.setdefault(row["shard_id"], []).append(row["image_id"])

    def read(shard_id: str) -> list[Row]:
        try:
            table = read_shard(output, run.shards, shard_id)
        except FileNotFoundError:
            return []
        # Shards of older versions have fewer columns.
        columns = [name for name in _SHARD_COLUMNS if name in table.column_names]
        chosen = pc.is_in(table.column("image_id"), value_set=pa.array(wanted[shard_id]))
        found: list[Row] = table.select(columns).filter(chosen).to_pylist()
        return found

    return {row["image_id"]: row for found in pool.map(read, wanted) for row in found}


def _compare(output: Store, night: str, root: str, shown: Sequence[Row]) -> Comparison:
    """Compares the night with earlier ones. If one of them cannot be read, the report lacks the comparison."""
    known = Comparison()
    try:
        published = [one for one in published_nights(output) if one <= night]
        before = find_night_before(output, night)
        if before is None:
            return known
        known = Comparison(before)
        known = replace(known, trend=drift.read_trend(output, published[-drift.TREND_NIGHTS :]))
        parts = [drift.compare_class(*pair) for pair in drift.read_pairs(output, before, night)]
        changed = _choose_changes(output, {found.class_name: changes for found, changes in parts})
    except (OSError, ValueError, KeyError) as error:
        fault = redact(f"{type(error).__name__}: {error}")
        logger.warning("the report of night %s lacks a comparison with earlier nights (%s)", night, fault)
        return replace(known, fault=_clip(fault, 2 * _LONGEST_KEY))
    counted: Counter[str] = Counter()
    for _, changes in parts:
        counted.update(changes.count())
    places = {(row["class_name"], row["image_uri"]): place for place, row in enumerate(shown)}
    return replace(
        known,
        classes=[found for found, _ in parts],
        counts={change: counted[change] for change in drift.CHANGES},
        images=[
            ChangedImage(
                class_name=row["class_name"],
                key=_clip(row["image_uri"].removeprefix(root)),
                change=row["change"],
                score_before=row["score_before"],
                score_after=row["score_after"],
                exhibit=places.get((row["class_name"], row["image_uri"])),
            )
            for row in changed
        ],
    )


def _choose_changes(output: Store, changes: Mapping[str, drift.Changes]) -> list[Row]:
    """Chooses the changed photos to list: first the newly anomalous, then the resolved; classes in equal shares."""
    chosen: list[Row] = []
    for kinds in (("became", "new"), ("resolved",)):
        found = {name: some.first(MOST_CHANGES, kinds) for name, some in changes.items()}
        shares = fair_shares([len(some.places) for some in found.values()], MOST_CHANGES - len(chosen))
        groups = [
            some.first(share).read(output, name) for (name, some), share in zip(found.items(), shares, strict=True)
        ]
        chosen += _by_rank(groups, "score_after")
    return chosen


def _read_job(output: Store, run_id: str) -> JobConfig:
    key = paths.run_key(run_id, "job.yaml")
    try:
        return parse_job(read_job_yaml(output.read(key).decode()))
    except FileNotFoundError:
        raise ReportError(f"{output.uri(key)} is missing: the folder of run {run_id} was removed or moved") from None


def _read_prompts(output: Store, run_id: str) -> Sequence[UsedPrompts]:
    """Reads the prompts of a run; empty for runs of older versions, which did not record them."""
    try:
        return RunPrompts.model_validate_json(output.read(paths.run_key(run_id, "prompts.json"))).classes
    except FileNotFoundError:
        return ()


def _common_root(uris: list[str]) -> str:
    """Returns the deepest folder that contains all addresses, with its slash."""
    prefix = posixpath.commonprefix(uris)
    return prefix[: prefix.rfind("/") + 1]


def _clip(text: str, most: int = _LONGEST_KEY) -> str:
    """Shortens a text to one line of about `most` characters, by leaving out its middle."""
    text = one_line(text)
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
