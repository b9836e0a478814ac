"""Which photos published nights hold, so that a night may leave out what needs no scoring: dataset.select new.

Each publish writes one file, ledger/<night>/<digest>.parquet, with the ids of its photos and what they were scored as,
before it writes the commit. The digest is that of what the commit says, and only files that a commit leads to count: a
file whose commit was never written, or was replaced or removed since, says nothing. So the ledger never says more than
the commits do, whenever a driver dies; where a file is missing, it is made from the rows that the commit names.

Two photos are one where address and ETag are (image_id), and were scored alike where the fingerprints of their classes
are equal (JobConfig.class_fingerprint): model, weights, method, prompts, references.
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
from schemas.job import parse_job, read_job_yaml
from schemas.prompts import RunPrompts
from schemas.records import Commit, CommitFile
from schemas.tables import LEDGER

logger = logging.getLogger(__name__)

_READERS = 16
_PARTS_AT_ONCE = 4
_BATCH = 16_384
_ROWS_PER_GROUP = 1 << 18
"""All row groups but the last have so many rows, so that a reader knows from the commit how many there are."""


@dataclass
class Selection:
    """How many images a night lists, and how many of them it leaves out."""

    listed: int = 0
    scored: int = 0
    """Have a score from another night."""
    given_up: int = 0
    """Failed in as many nights as they are tried."""


@dataclass(frozen=True, eq=False)
class KnownPhotos:
    """The photos that need not be scored again: 16 bytes each, whatever their number of nights.

    scored: have a score; given_up: failed in as many nights as they are tried. Each id is combined with the fingerprint
    that the photo was scored as. fingerprints: those of tonight, by class.
    """

    scored: IdSet
    given_up: IdSet
    fingerprints: Mapping[str, str]

    def find(self, images: pa.RecordBatch) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Which images (manifest rows) are scored, and which others are given up."""
        classes = images.column("class_name").dictionary_encode()
        names = classes.dictionary.to_pylist()
        alike = np.asarray([name in self.fingerprints for name in names], np.bool_)
        marks = _marks([self.fingerprints.get(name, "0" * 32) for name in names])
        numbers = classes.indices.to_numpy()
        ids = _combine(_to_bytes(images.column("image_id")), marks[numbers])
        scored = self.scored.contains(ids) & alike[numbers]
        return scored, self.given_up.contains(ids) & alike[numbers] & ~scored

    def leave_out(self, listed: Iterable[pa.RecordBatch], selection: Selection) -> Iterator[pa.RecordBatch]:
        """The images (manifest rows) that are to be scored, in their order; counts all of them in `selection`."""

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
    """The photos that need not be scored again, of all that the ledgers hold.

    Args:
        fingerprints: what each class is scored as tonight (JobConfig.class_fingerprint).
        error_nights: nights in which a photo has failed, from which on it is given up.
        mended: where ledgers that are missing are written; default: where they belong.
    """
    there = {info.key for info in output.list(paths.LEDGER)}
    wanted = sorted(set(fingerprints.values()))
    parts: list[tuple[Store, str, int]] = []
    rows = 0
    for ledger in ledgers:
        if not set(ledger.fingerprints.values()) & set(wanted):
            continue
        store = output
        if ledger.key not in there:
            logger.warning("the ledger of night %s is missing; it is made from the night's rows", ledger.night)
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
    return KnownPhotos(IdSet(scored[:count]), IdSet(ids[nights >= error_nights]), fingerprints)


@dataclass(frozen=True)
class Ledger:
    """Where the ledger of a published night lies, and what it is made from.

    fingerprints: by class; a class that has none (of a run of an older version, with references) is not in the ledger.
    """

    night: str
    entries: Sequence[CommitFile]
    fingerprints: Mapping[str, str]
    key: str

    @property
    def rows(self) -> int:
        """Photos in it."""
        return sum(entry.rows for entry in self.entries)


def find_ledgers(output: Store, but_for: date | None = None) -> list[Ledger]:
    """The ledgers of all published nights, or all but one, as their commits say; the oldest first."""
    nights = [night for night in published_nights(output) if night != str(but_for)]
    with ThreadPoolExecutor(_READERS, "commits") as pool:
        found = map_ahead(pool, lambda night: find_ledger(output, night), nights, ahead=2 * _READERS)
        return [ledger for ledger in found if ledger is not None]


def find_ledger(output: Store, night: str) -> Ledger | None:
    """The ledger of a night, as its commit says; None where the night is not published."""
    commit = read_commit(output, night)
    return None if commit is None else describe_ledger(commit, _fingerprints(output, commit))


def describe_ledger(commit: Commit, fingerprints: Mapping[str, str]) -> Ledger:
    """The ledger of a commit whose classes were scored as `fingerprints` say."""
    entries = [entry for entry in commit.files if entry.class_name in fingerprints]
    facts = [[entry.class_name, entry.sha256, fingerprints[entry.class_name]] for entry in entries]
    digest = hashlib.blake2b(json.dumps([commit.run_id, facts]).encode(), digest_size=8).hexdigest()
    return Ledger(str(commit.run_date), entries, fingerprints, paths.ledger_key(commit.run_date, digest))


def write_ledger(output: Store, ledger: Ledger, place: Store | None = None) -> None:
    """Writes the ledger of a night from its rows; place: the store, default: the output."""
    with tempfile.TemporaryDirectory(prefix="alfa-ledger-") as scratch:
        path = Path(scratch, "ledger.parquet")
        classes = (
            (ledger.fingerprints[entry.class_name], read_groups(output, entry, COLUMNS)) for entry in ledger.entries
        )
        build_ledger(classes, path)
        (place or output).write(ledger.key, path)


class State(str, Enum):
    """What a file of the ledger is, held against the commits."""

    WHOLE = "whole"
    MISSING = "missing"
    DIFFERENT = "different"
    SUPERSEDED = "superseded"


def check_ledger(output: Store, ledger: Ledger) -> State:
    """Makes a night's ledger from its rows, and compares it with the one that is there."""
    if not output.exists(ledger.key):
        return State.MISSING
    with tempfile.TemporaryDirectory(prefix="alfa-ledger-") as scratch:
        made = Store(scratch)
        write_ledger(output, ledger, made)
        with output.open(ledger.key) as first, made.open(ledger.key) as second:
            return State.WHOLE if _are_equal(first, second) else State.DIFFERENT


def rebuild_ledger(output: Store, night: str, owner: str) -> State:
    """Checks the ledger of a night, and writes it where it is missing or different. Returns what it was.

    owner: who does so, for the lease on the night, which keeps it from being published meanwhile.
    """
    lease = leases.acquire(output, paths.night_lease(date.fromisoformat(night)), owner, leases.LEASE_S)
    assert lease is not None  # it is never done without us
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
"""The columns of a published row that a ledger is made of."""


def build_ledger(classes: Iterable[tuple[str, Iterable[pa.Table]]], path: Path) -> None:
    """Writes a ledger to a local file. classes: of each, its fingerprint and its rows."""
    parts = (_to_ledger(fingerprint, rows) for fingerprint, tables in classes for rows in tables)
    with pq.ParquetWriter(path, LEDGER, compression="zstd", use_dictionary=["scored_as"]) as writer:
        for table in regroup(parts, _ROWS_PER_GROUP):
            writer.write_table(table, row_group_size=_ROWS_PER_GROUP)


def _fingerprints(output: Store, commit: Commit) -> dict[str, str]:
    """What each class of a night was scored as: as the commit says, else as the run's folder lets one tell."""
    said = {entry.class_name: entry.scored_as for entry in commit.files if entry.scored_as}
    if said or not commit.files or any("scored_as" in entry.model_fields_set for entry in commit.files):
        return said
    try:
        job = parse_job(read_job_yaml(output.read(paths.run_key(commit.run_id, "job.yaml")).decode()))
        prompts = RunPrompts.model_validate_json(output.read(paths.run_key(commit.run_id, "prompts.json")))
    except (FileNotFoundError, ValueError):
        return {}
    if job.references is not None:  # which images they were is not written down
        return {}
    with open_file(output, commit.files[0]) as file:
        weights = file.schema_arrow.metadata[b"alfa.weights_sha256"].decode()
    return {
        ensemble.class_name: job.class_fingerprint(ensemble.class_name, weights, ensemble.fingerprint)
        for ensemble in prompts.ensembles
    }


def _are_equal(first: BinaryIO, second: BinaryIO) -> bool:
    """Whether two ledgers say the same; their bytes may be those of different versions of Arrow."""
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


def _read_part(store: Store, key: str, number: int, wanted: Sequence[str]) -> tuple[Ids, Ids]:
    """The photos of a row group that were scored as one of `wanted`: those with a score, and those without."""
    with (
        store.open(key) as source,
        pq.ParquetFile(source, pre_buffer=True, read_dictionary=["scored_as"]) as file,
    ):
        table = file.read_row_group(number).combine_chunks()
    table = table.filter(pc.is_in(table.column("scored_as"), value_set=pa.array(wanted, pa.string()))).combine_chunks()
    scored_as = table.column("scored_as").combine_chunks()
    photos = table.column("photo").combine_chunks()
    first = 16 * photos.offset
    data = memoryview(photos.buffers()[1] or b"")[first : first + 16 * len(photos)]
    ids = _combine(data, _marks(scored_as.dictionary.to_pylist())[scored_as.indices.to_numpy()])
    ok = table.column("ok").to_numpy()
    return ids[ok], ids[~ok]


def _to_bytes(ids: pa.StringArray) -> bytes:
    """Ids in hex digits as bytes, one after the other."""
    _, offsets, data = ids.buffers()
    places = np.frombuffer(offsets or b"", np.int32)[ids.offset : ids.offset + len(ids) + 1]
    if not len(ids):
        return b""
    digits = memoryview(data or b"")[places[0] : places[-1]]
    if (np.diff(places) != 32).any():
        raise ValueError("an image_id is not 32 hex digits")
    return binascii.unhexlify(digits)


def _marks(fingerprints: Sequence[str]) -> npt.NDArray[np.uint64]:
    """Fingerprints of 32 hex digits as numbers [N, 2]."""
    return np.frombuffer(bytes.fromhex("".join(fingerprints)), np.uint64).reshape(-1, 2)


def _combine(ids: bytes | memoryview, marks: npt.NDArray[np.uint64]) -> Ids:
    """Each id and its fingerprint as one: hashes, so that their exclusive or is as good as a hash of both."""
    combined = np.frombuffer(ids, np.uint64).reshape(-1, 2) ^ marks
    return combined.view("S16").ravel()
