"""The ledger: the photos that published nights hold, so that `dataset.select: new` can leave them out.

Before a commit is written, its night's photos are written to ledger/<night>/<digest>.parquet, each with its id and the
fingerprint under which it was scored. The digest follows from the content of the commit. A file is only read if a
commit leads to it, so the ledger never says more than the commits, whenever a driver dies. A missing file is made anew
from the rows that the commit names.

Two photos are the same if address and ETag are equal (image_id). They were scored alike if the fingerprints of their
classes are equal (JobConfig.class_fingerprint): model, weights, method, prompts, references; and if the span of the
class (CommitFile.span), where a night has decided one, is that of its latest night.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from enum import Enum
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.lake.commits import published_nights, read_commit
from pipeline.lake.ids import Ids, IdSet
from pipeline.lake.reading import open_file, read_groups
from pipeline.lake.sorting import regroup
from pipeline.storage import Store, leases, map_ahead, paths
from schemas.job import add_span, parse_job, read_job_yaml
from schemas.prompts import RunPrompts
from schemas.records import Commit, CommitFile
from schemas.tables import LEDGER

logger = logging.getLogger(__name__)

_READERS = 16
_PARTS_AT_ONCE = 4
_BATCH = 16_384
_ROWS_PER_GROUP = 1 << 18
"""Rows of each row group but the last. It is fixed, so that a reader knows the number of groups from the commit."""


@dataclass
class Selection:
    """How many images a night lists, and how many of them it leaves out."""

    listed: int = 0
    scored: int = 0
    """Images left out because another night has scored them."""
    given_up: int = 0
    """Images left out because they failed in too many nights."""


@dataclass(frozen=True, eq=False)
class KnownPhotos:
    """The photos that need not be scored again: about 17 bytes for each row of the ledgers.

    scored: photos that have a score. given_up: photos that failed in too many nights. In both, each id is combined with
    the fingerprint under which the photo was scored. fingerprints: tonight's, by class. spans: CommitFile.span of each
    class in its latest night.
    """

    scored: IdSet
    given_up: IdSet
    fingerprints: Mapping[str, str]
    spans: Mapping[str, tuple[float, float]]

    def find(self, images: pa.RecordBatch) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Returns, for each image (a manifest row), whether it is scored already, and whether it is given up."""
        classes = images.column("class_name").dictionary_encode()
        names = classes.dictionary.to_pylist()
        alike = np.asarray([name in self.fingerprints for name in names], np.bool_)
        marks = _marks([self.fingerprints.get(name, "0" * 32) for name in names])
        numbers = classes.indices.to_numpy()
        ids = _combine(_to_bytes(images.column("image_id")), marks[numbers])
        scored = self.scored.contains(ids) & alike[numbers]
        return scored, self.given_up.contains(ids) & alike[numbers] & ~scored

    def leave_out(self, listed: Iterable[pa.RecordBatch], selection: Selection) -> Iterator[pa.RecordBatch]:
        """Yields the images (manifest rows) to score, in order, and counts all listed images in `selection`."""

        def choose() -> Iterator[pa.Table]:
            for batch in listed:
                scored, given_up = self.find(batch)
                selection.listed += batch.num_rows
                selection.scored += int(scored.sum())
                selection.given_up += int(given_up.sum())
                yield pa.Table.from_batches([batch]).filter(pa.array(~(scored | given_up)))

        for table in regroup(choose(), _BATCH):
            yield from table.to_batches()


def read_known(
    output: Store,
    ledgers: Sequence[Ledger],
    fingerprints: Mapping[str, str],
    error_nights: int,
    mended: Store | None = None,
) -> KnownPhotos:
    """Reads from the ledgers which photos need not be scored again.

    Args:
        output: the store of the results.
        ledgers: the ledgers to read.
        fingerprints: JobConfig.class_fingerprint of each class tonight, without a span.
        error_nights: after how many nights of failure a photo is given up.
        mended: the store to which missing ledgers are written; default: the output.
    """
    there = {info.key for info in output.list(paths.LEDGER)}
    spans = _latest_spans(ledgers, fingerprints)
    tonight = {name: add_span(mark, spans.get(name)) for name, mark in fingerprints.items()}
    # A night without a span has met no photo whose score depends on one.
    wanted = {**{fingerprints[name]: mark for name, mark in tonight.items()}, **{m: m for m in tonight.values()}}
    parts: list[tuple[Store, str, int]] = []
    rows = 0
    for ledger in ledgers:
        if not set(ledger.fingerprints.values()) & wanted.keys():
            continue
        store = output
        if ledger.key not in there:
            logger.warning("the ledger of night %s is missing, so it is made from the night's rows", ledger.night)
            store = mended or output
            write_ledger(output, ledger, store)
        parts += [(store, ledger.key, number) for number in range(-(-ledger.rows // _ROWS_PER_GROUP))]
        rows += ledger.rows
    scored: Ids = np.empty(rows, "S16")
    failed: list[Ids] = [np.empty(0, "S16")]
    count = 0
    with ThreadPoolExecutor(_PARTS_AT_ONCE, "ledger") as pool:
        for good, bad in map_ahead(pool, lambda part: _read_part(*part, wanted), parts, ahead=_PARTS_AT_ONCE):
            scored[count : count + len(good)] = good
            count += len(good)
            failed.append(bad)
    ids, nights = np.unique(np.concatenate(failed), return_counts=True)
    return KnownPhotos(IdSet(scored[:count]), IdSet(ids[nights >= error_nights]), tonight, spans)


def _latest_spans(ledgers: Sequence[Ledger], fingerprints: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """By class, the span of the latest of its nights that differ from `fingerprints` in nothing but a span."""
    return {
        entry.class_name: entry.span
        for ledger in ledgers
        for entry in ledger.entries
        if entry.span is not None
        and (mark := fingerprints.get(entry.class_name)) is not None
        and ledger.fingerprints[entry.class_name] == add_span(mark, entry.span)
    }


@dataclass(frozen=True)
class Ledger:
    """The ledger of a published night: its key, and what it is made from.

    entries: the files of the commit that are in it. fingerprints: by class. A class without one (scored with references
    by an older version) is not in the ledger.
    """

    night: str
    entries: Sequence[CommitFile]
    fingerprints: Mapping[str, str]
    key: str

    @property
    def rows(self) -> int:
        """The number of photos in the ledger."""
        return sum(entry.rows for entry in self.entries)


def find_ledgers(output: Store, but_for: date | None = None) -> list[Ledger]:
    """Finds the ledgers of all published nights, the oldest first. but_for: a night to leave out."""
    nights = [night for night in published_nights(output) if night != str(but_for)]
    with ThreadPoolExecutor(_READERS, "commits") as pool:
        found = map_ahead(pool, lambda night: find_ledger(output, night), nights, ahead=2 * _READERS)
        return [ledger for ledger in found if ledger is not None]


def find_ledger(output: Store, night: str) -> Ledger | None:
    """Finds the ledger of a night; None if the night is not published."""
    commit = read_commit(output, night)
    return None if commit is None else describe_ledger(commit, _fingerprints(output, commit))


def describe_ledger(commit: Commit, fingerprints: Mapping[str, str]) -> Ledger:
    """Describes the ledger of a commit. fingerprints: JobConfig.class_fingerprint of its classes."""
    entries = [entry for entry in commit.files if entry.class_name in fingerprints]
    facts = [[entry.class_name, entry.sha256, fingerprints[entry.class_name]] for entry in entries]
    digest = hashlib.blake2b(json.dumps([commit.run_id, facts]).encode(), digest_size=8).hexdigest()
    return Ledger(str(commit.run_date), entries, fingerprints, paths.ledger_key(commit.run_date, digest))


def write_ledger(output: Store, ledger: Ledger, place: Store | None = None) -> None:
    """Writes the ledger of a night from its rows. place: the store to write to; default: the output."""
    with tempfile.TemporaryDirectory(prefix="alfa-ledger-") as scratch:
        path = Path(scratch, "ledger.parquet")
        classes = (
            (ledger.fingerprints[entry.class_name], read_groups(output, entry, COLUMNS)) for entry in ledger.entries
        )
        build_ledger(classes, path)
        (place or output).write(ledger.key, path)


class State(str, Enum):
    """How a file of the ledger compares with the commits."""

    WHOLE = "whole"
    MISSING = "missing"
    DIFFERENT = "different"
    SUPERSEDED = "superseded"


def check_ledger(output: Store, ledger: Ledger) -> State:
    """Makes a night's ledger from its rows, and compares it with the stored one."""
    if not output.exists(ledger.key):
        return State.MISSING
    with tempfile.TemporaryDirectory(prefix="alfa-ledger-") as scratch:
        made = Store(scratch)
        write_ledger(output, ledger, made)
        with output.open(ledger.key) as first, made.open(ledger.key) as second:
            return State.WHOLE if _are_equal(first, second) else State.DIFFERENT


def rebuild_ledger(output: Store, night: str, owner: str) -> State:
    """Checks the ledger of a night, and writes it if it is missing or different. Returns the state before.

    owner: name of this process, for the lease on the night, which keeps others from publishing it meanwhile.
    """
    lease = leases.acquire(output, paths.night_lease(date.fromisoformat(night)), owner, leases.LEASE_S)
    assert lease is not None  # acquire waits, because is_done is never true
    with lease.held(leases.LEASE_S):
        ledger = find_ledger(output, night)
        if ledger is None or not ledger.entries:
            return State.WHOLE
        state = check_ledger(output, ledger)
        if state is not State.WHOLE:
            lease.check()
            write_ledger(output, ledger)
        return state


COLUMNS = ("image_id", "status")
"""The columns of published rows from which a ledger is made."""


def build_ledger(classes: Iterable[tuple[str, Iterable[pa.Table]]], path: Path) -> None:
    """Writes a ledger to a local file. classes: fingerprint and rows of each class."""
    parts = (_to_ledger(fingerprint, rows) for fingerprint, tables in classes for rows in tables)
    with pq.ParquetWriter(path, LEDGER, compression="zstd", use_dictionary=["scored_as"]) as writer:
        for table in regroup(parts, _ROWS_PER_GROUP):
            writer.write_table(table, row_group_size=_ROWS_PER_GROUP)


def _fingerprints(output: Store, commit: Commit) -> dict[str, str]:
    """Returns the fingerprints of a night's classes from its commit; for early versions, from the run's folder."""
    said = {entry.class_name: entry.scored_as for entry in commit.files if entry.scored_as}
    if said or not commit.files or any("scored_as" in entry.model_fields_set for entry in commit.files):
        return said
    try:
        job = parse_job(read_job_yaml(output.read(paths.run_key(commit.run_id, "job.yaml")).decode()))
        prompts = RunPrompts.model_validate_json(output.read(paths.run_key(commit.run_id, "prompts.json")))
    except (FileNotFoundError, ValueError):
        return {}
    if job.references is not None:  # early versions did not record which images they were
        return {}
    with open_file(output, commit.files[0]) as file:
        weights = file.schema_arrow.metadata[b"alfa.weights_sha256"].decode()
    return {
        ensemble.class_name: job.class_fingerprint(ensemble.class_name, weights, ensemble.fingerprint)
        for ensemble in prompts.ensembles
    }


def _are_equal(first: BinaryIO, second: BinaryIO) -> bool:
    """Whether two ledgers have equal rows. Their bytes may differ, because different versions of Arrow wrote them."""
    with pq.ParquetFile(first, pre_buffer=True) as left, pq.ParquetFile(second) as right:
        if left.metadata.num_rows != right.metadata.num_rows or left.num_row_groups != right.num_row_groups:
            return False
        numbers = range(left.num_row_groups)
        return all(left.read_row_group(number).equals(right.read_row_group(number)) for number in numbers)


def _to_ledger(fingerprint: str, rows: pa.Table) -> pa.Table:
    photos = pa.py_buffer(_to_bytes(rows.column("image_id").combine_chunks()))
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), rows.num_rows, [None, photos]),
        pa.repeat(pa.scalar(fingerprint), rows.num_rows),
        pc.equal(rows.column("status"), "ok").combine_chunks(),
    ]
    return pa.table(columns, schema=LEDGER)


def _read_part(store: Store, key: str, number: int, wanted: Mapping[str, str]) -> tuple[Ids, Ids]:
    """Reads the photos of a row group whose fingerprint is in `wanted`: those with a score, and those without.

    wanted: maps fingerprints to those of tonight that mean the same.
    """
    with (
        store.open(key) as source,
        pq.ParquetFile(source, pre_buffer=True, read_dictionary=["scored_as"]) as file,
    ):
        table = file.read_row_group(number).combine_chunks()
    table = table.filter(
        pc.is_in(table.column("scored_as"), value_set=pa.array(list(wanted), pa.string()))
    ).combine_chunks()
    scored_as = table.column("scored_as").combine_chunks()
    photos = table.column("photo").combine_chunks()
    first = 16 * photos.offset
    data = memoryview(photos.buffers()[1] or b"")[first : first + 16 * len(photos)]
    marks = _marks([wanted.get(mark, mark) for mark in scored_as.dictionary.to_pylist()])
    ids = _combine(data, marks[scored_as.indices.to_numpy()])
    ok = table.column("ok").to_numpy()
    return ids[ok], ids[~ok]


def _to_bytes(ids: pa.StringArray) -> bytes:
    """Turns ids of 32 hex digits into their bytes, one after the other. Raises ValueError for other lengths."""
    _, offsets, data = ids.buffers()
    places = np.frombuffer(offsets or b"", np.int32)[ids.offset : ids.offset + len(ids) + 1]
    if not len(ids):
        return b""
    digits = memoryview(data or b"")[places[0] : places[-1]]
    if (np.diff(places) != 32).any():
        raise ValueError("an image_id is not 32 hex digits")
    return binascii.unhexlify(digits)


def _marks(fingerprints: Sequence[str]) -> npt.NDArray[np.uint64]:
    """Turns fingerprints of 32 hex digits into numbers [N, 2], uint64."""
    return np.frombuffer(bytes.fromhex("".join(fingerprints)), np.uint64).reshape(-1, 2)


def _combine(ids: bytes | memoryview, marks: npt.NDArray[np.uint64]) -> Ids:
    """Combines each id with its fingerprint by exclusive or. Both are hashes, so that is as good as a hash of both."""
    combined = np.frombuffer(ids, np.uint64).reshape(-1, 2) ^ marks
    return combined.view("S16").ravel()
