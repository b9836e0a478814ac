"""Publishes finished shards: writes the partitioned scores table, and the commit that says what belongs to a night.

Readers can rely on this while a night is published again:
- A reader of the files that commits/<run_date>.json names sees the whole old night or the whole new one. The name of
  such a file contains a hash of its content, so it is never overwritten, and the commit is replaced in one step.
- A reader of the table by a glob sees, for each class, its old rows or its new ones. Each class is one file with a
  fixed name, replaced in one step. For a moment, different classes may come from different runs.

So a class and night is one file of any size, because several files could not be replaced in one step. Its rows are
sorted by score. Row groups of 65,536 rows with statistics and a page index let readers fetch only the part they need.

If two processes publish one night at once, one waits for the other (a lease). A process that was cut off for longer
than its lease, and wakes up after another has published, writes nothing more: it replaces the table's files and the
commit only if they are still what it found when it began. The store compares that (Store.replace says which stores do).
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.lake.commits import read_commit
from pipeline.lake.ledger import COLUMNS, build_ledger, describe_ledger
from pipeline.lake.sorting import ORDER, RowSorter
from pipeline.storage import Run, Store, leases, map_ahead, paths, read_chunks, read_shards, sha256_of
from schemas.job import add_span
from schemas.records import Commit, CommitFile, dump_record
from schemas.tables import FENCE, SCHEMA_VERSION, SCORES

logger = logging.getLogger(__name__)

_COLUMNS = ["class_name", *SCORES.names]
_ROWS_PER_GROUP = 65_536


def publish_night(
    run: Run,
    manifest_digest: str,
    folder: str,
    shard_ids: Sequence[str],
    output: Store,
    owner: str,
    fingerprints: Mapping[str, str] | None = None,
    spans: Mapping[str, tuple[float, float]] | None = None,
) -> Commit:
    """Publishes the shards of a run as its night. Returns the commit. Doing it again changes nothing.

    Memory is bounded for any number of rows. A local scratch folder (TMPDIR) holds the compressed rows and the table's
    files. The commit is written last, so a night that has one is complete. If two processes publish the same night, one
    waits for the other, and the later commit wins.

    Args:
        run: the run.
        manifest_digest: digest of its manifest.
        folder: folder of the shards.
        shard_ids: the shards to publish.
        output: the store to publish in.
        owner: name of this process, for the lease.
        fingerprints: JobConfig.class_fingerprint by class, for the ledger; a class without one is not in it.
        spans: what became black and white in deep photos, by class, as read_spans of the scoring room returns it.

    Raises LeaseLostError where another process has published the night meanwhile.
    """
    spans = spans or {}
    marks = {name: add_span(mark, spans.get(name)) for name, mark in (fingerprints or {}).items()}
    lease_s = run.job.engine.lease_s
    lease = leases.acquire(output, paths.night_lease(run.job.run_date), owner, lease_s)
    assert lease is not None  # acquire waits, because is_done is never true
    with lease.held(lease_s):
        before = read_commit(output, run.job.run_date)
        if before and before.run_id != run.run_id:
            logger.warning("night %s was published by run %s; this run replaces it", run.job.run_date, before.run_id)
        return _publish(run, manifest_digest, folder, shard_ids, output, lease, marks, spans)


def _publish(
    run: Run,
    manifest_digest: str,
    folder: str,
    shard_ids: Sequence[str],
    output: Store,
    lease: leases.Lease,
    fingerprints: Mapping[str, str],
    spans: Mapping[str, tuple[float, float]],
) -> Commit:
    run_date = run.job.run_date
    commit_version = output.version(paths.commit_key(run_date))
    found = {info.key: output.version(info.key) for info in output.list(f"{paths.TABLE}/run_date={run_date}")}
    with tempfile.TemporaryDirectory(prefix="alfa-publish-") as scratch:
        files = _write_files(run, read_shards(output, folder, shard_ids, _COLUMNS), Path(scratch))
        entries = [
            _entry(run, manifest_digest, file, fingerprints.get(file.class_name), spans.get(file.class_name))
            for file in files
        ]
        commit = _commit(run, manifest_digest, folder, entries)
        for file, entry in zip(files, entries, strict=True):
            if not output.exists(entry.key):
                output.write(entry.key, file.path)
        for file, entry in zip(files, entries, strict=True):
            lease.check()
            _replace(output, entry.table_key, file.path, found.get(entry.table_key), lease)
        _write_ledger(commit, files, fingerprints, output, Path(scratch))
    for key in found.keys() - {entry.table_key for entry in entries}:
        output.delete(key)
    lease.check()
    _replace(output, paths.commit_key(run_date), dump_record(commit), commit_version, lease)
    return commit


def _replace(output: Store, key: str, data: bytes | Path, version: str | None, lease: leases.Lease) -> None:
    if output.replace(key, data, version) or output.holds(key, data):
        return
    lease.check()  # its error names the other process, if that is known
    raise leases.LeaseLostError(
        f"another process has written {output.uri(key)} while this one was publishing; this one stops"
    )


@dataclass
class _Counts:
    """The counts of a class, collected while its rows are written."""

    rows: int = 0
    anomalies: int = 0
    compared: int = 0
    beyond: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    prompts: set[str] = field(default_factory=set)

    def count(self, rows: pa.Table) -> None:
        self.rows += rows.num_rows
        self.anomalies += pc.sum(rows.column("is_anomalous")).as_py() or 0
        peers = pc.fill_null(pc.greater(rows.column("peers"), 0), False)
        self.compared += pc.sum(peers).as_py() or 0
        self.beyond += pc.sum(pc.and_(peers, pc.greater(rows.column("score"), FENCE))).as_py() or 0
        for entry in pc.value_counts(rows.column("error_type").drop_null()).to_pylist():
            self.errors[entry["values"]] += entry["counts"]
        self.prompts.update(pc.unique(rows.column("prompt_fingerprint").drop_null()).to_pylist())


@dataclass(frozen=True, eq=False)
class _File:
    """The table's file of a class, in a local folder."""

    class_name: str
    path: Path
    sha256: str
    counts: _Counts


def _write_files(run: Run, tables: Iterable[pa.Table], folder: Path) -> list[_File]:
    """Writes one file per class; returns them sorted by class name. Memory is bounded for any number of rows.

    A shard may hold several classes, and all shards together do not fit in memory; RowSorter handles both.
    """
    with RowSorter(folder / "rows.arrow", SCORES) as sorter:
        for table in tables:
            names = pc.unique(table.column("class_name")).to_pylist()
            for class_name in names:
                chosen = table if len(names) == 1 else table.filter(pc.equal(table.column("class_name"), class_name))
                sorter.add(class_name, chosen.select(SCORES.names))
        files = []
        for number, class_name in enumerate(sorter.finish()):
            path = folder / f"{number}.parquet"
            counts = _write_file(run, sorter.read(class_name, _ROWS_PER_GROUP), path)
            files.append(_File(class_name, path, sha256_of(read_chunks(path)), counts))
        return files


def _write_file(run: Run, groups: Iterable[pa.Table], path: Path) -> _Counts:
    """Writes the row groups of a class, and counts its rows. A thread encodes one group while the next is sorted."""
    counts = _Counts()
    provenance = {
        "schema_version": str(SCHEMA_VERSION),
        "alfa.run_id": run.run_id,
        "alfa.model": run.model,
        "alfa.weights_sha256": run.weights_sha256,
        "alfa.config_hash": run.job.config_fingerprint,
    }
    schema = SCORES.with_metadata(provenance)
    with (
        pq.ParquetWriter(
            path,
            schema,
            compression="zstd",
            coerce_timestamps="us",
            write_page_index=True,
            sorting_columns=pq.SortingColumn.from_ordering(schema, ORDER),
        ) as writer,
        ThreadPoolExecutor(1) as pool,
    ):

        def write(group: pa.Table) -> None:
            counts.count(group)
            writer.write_table(group.replace_schema_metadata(provenance), row_group_size=group.num_rows)

        deque(map_ahead(pool, write, groups, ahead=2), maxlen=0)
        writer.add_key_value_metadata({"alfa.prompt_fingerprint": ",".join(sorted(counts.prompts))})
    return counts


def _write_ledger(
    commit: Commit, files: Sequence[_File], fingerprints: Mapping[str, str], output: Store, folder: Path
) -> None:
    """Writes the ledger of the commit from the local files. It is not read before the commit is written."""
    ledger = describe_ledger(commit, fingerprints)
    if not ledger.entries:
        return
    parts = (
        (fingerprints[file.class_name], _read_columns(file.path, COLUMNS))
        for file in files
        if file.class_name in fingerprints
    )
    build_ledger(parts, folder / "ledger.parquet")
    output.write(ledger.key, folder / "ledger.parquet")


def _read_columns(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, list(columns))


def _entry(
    run: Run, manifest_digest: str, file: _File, fingerprint: str | None, span: tuple[float, float] | None
) -> CommitFile:
    run_date, counts = run.job.run_date, file.counts
    return CommitFile(
        class_name=file.class_name,
        scored_as=fingerprint,
        span=span,
        rows=counts.rows,
        errors=dict(sorted(counts.errors.items())),
        anomalies=counts.anomalies,
        compared=counts.compared,
        beyond=counts.beyond,
        key=paths.version_key(run.run_id, manifest_digest, run_date, file.class_name, file.sha256),
        table_key=paths.table_key(run_date, file.class_name),
        bytes=file.path.stat().st_size,
        sha256=file.sha256,
    )


def _commit(run: Run, manifest_digest: str, folder: str, entries: Sequence[CommitFile]) -> Commit:
    return Commit(
        run_date=run.job.run_date,
        run_id=run.run_id,
        manifest=manifest_digest,
        shards=folder,
        select=run.job.dataset.select,
        rows=sum(entry.rows for entry in entries),
        committed_at=datetime.now(timezone.utc),
        files=tuple(entries),
    )
