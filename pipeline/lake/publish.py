"""Finished shards -> the partitioned scores table, and the commit that says what belongs to a night.

What readers are promised while a night is published again:
- who reads the files that commits/<run_date>.json names sees the whole old night or the whole new one: the name of such
  a file tells its content, so it is never written again, and the commit is replaced in one step;
- who reads the table by a glob sees, for each class, its old rows or its new ones: each class is one file of a fixed
  name, replaced in one step. Different classes may for a moment be of different runs.

So a class and night is one file whatever its size: several files could not be replaced in one step. Its rows are sorted
by score, and row groups of 65,536 rows with statistics and a page index let readers fetch the part that they ask for.

Of two who publish one night at once, one waits (a lease). One that was cut off for longer than its lease, and wakes up
after another has published, writes nothing more: each file of the table and the commit are replaced only if they are
what it found when it began, which the store itself compares (see Store.replace for which stores do).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.storage import Run, Store, leases, paths, read_shards
from schemas.tables import SCHEMA_VERSION, SCORES

logger = logging.getLogger(__name__)

_COLUMNS = ["class_name", *SCORES.names]
_ORDER = [("score", "descending"), ("image_uri", "ascending")]
_ROWS_PER_GROUP = 65_536


def publish_night(
    run: Run, manifest_digest: str, folder: str, shard_ids: Sequence[str], output: Store, owner: str
) -> dict[str, Any]:
    """Publishes the shards of a run below `folder` as its night; returns the commit. Doing it again changes nothing.

    Memory is that of the largest class. The commit is written last: a night that has it is published as a whole. Of two
    who publish the same night, one waits for the other; the later commit wins. owner: who publishes, for the lease.
    """
    lease_s = run.job.engine.lease_s
    lease = leases.acquire(output, paths.night_lease(run.job.run_date), owner, lease_s)
    assert lease is not None  # it is never done without us
    with lease.held(lease_s):
        before = read_commit(output, run.job.run_date)
        if before and before["run_id"] != run.run_id:
            logger.warning("night %s was published by run %s; this run replaces it", run.job.run_date, before["run_id"])
        return _publish(run, manifest_digest, folder, shard_ids, output, lease)


def _publish(
    run: Run, manifest_digest: str, folder: str, shard_ids: Sequence[str], output: Store, lease: leases.Lease
) -> dict[str, Any]:
    run_date = run.job.run_date
    commit_version = output.version(paths.commit_key(run_date))
    found = {info.key: output.version(info.key) for info in output.list(f"{paths.TABLE}/run_date={run_date}")}
    with tempfile.TemporaryDirectory(prefix="alfa-publish-") as scratch:
        parts = _split_by_class(Path(scratch), read_shards(output, folder, shard_ids, _COLUMNS))
        entries = []
        for class_name, path in sorted(parts.items()):
            with pa.ipc.open_stream(path) as rows:
                table = rows.read_all().sort_by(_ORDER)
            path.write_bytes(data := _encode(table, run))
            entry = _entry(run, manifest_digest, class_name, table, data)
            if not output.exists(entry["key"]):
                output.write(entry["key"], data)
            entries.append(entry)
        for entry in entries:
            lease.check()
            key = entry["table_key"]
            _replace(output, key, parts[entry["class_name"]].read_bytes(), found.get(key), lease)
    for key in found.keys() - {entry["table_key"] for entry in entries}:
        output.delete(key)
    commit = _commit(run, manifest_digest, folder, entries)
    lease.check()
    data = json.dumps(commit, indent=2, ensure_ascii=False).encode()
    _replace(output, paths.commit_key(run_date), data, commit_version, lease)
    return commit


def _replace(output: Store, key: str, data: bytes, version: str | None, lease: leases.Lease) -> None:
    if output.replace(key, data, version) or output.read(key) == data:
        return
    lease.check()  # says who it was, where that is known
    raise leases.LeaseLostError(f"{output.uri(key)} was written by another while this process published; it stops")


def read_commit(output: Store, run_date: Any) -> dict[str, Any] | None:
    """What belongs to a night; None where nothing is published."""
    try:
        commit: dict[str, Any] = json.loads(output.read(paths.commit_key(run_date)))
    except FileNotFoundError:
        return None
    return commit


def _split_by_class(folder: Path, tables: Iterable[pa.Table]) -> dict[str, Path]:
    """One local file a class, since a shard may hold several classes and all shards together do not fit in memory.

    Arrow streams: a Parquet writer would hold the metadata of a row group for each shard and class.
    """
    paths: dict[str, Path] = {}
    with ExitStack() as stack:
        writers: dict[str, pa.ipc.RecordBatchStreamWriter] = {}
        for table in tables:
            for class_name in pc.unique(table.column("class_name")).to_pylist():
                if class_name not in writers:
                    paths[class_name] = folder / f"{len(paths)}.arrow"
                    options = pa.ipc.IpcWriteOptions(compression="zstd")
                    writer = pa.ipc.new_stream(paths[class_name], SCORES, options=options)
                    writers[class_name] = stack.enter_context(writer)
                rows = table.filter(pc.equal(table.column("class_name"), class_name)).select(SCORES.names)
                writers[class_name].write_table(rows.cast(SCORES))
    return paths


def _encode(table: pa.Table, run: Run) -> bytes:
    prompts = sorted(pc.unique(table.column("prompt_fingerprint").drop_null()).to_pylist())
    provenance = {
        "schema_version": str(SCHEMA_VERSION),
        "alfa.run_id": run.run_id,
        "alfa.model": run.model,
        "alfa.weights_sha256": run.weights_sha256,
        "alfa.prompt_fingerprint": ",".join(prompts),
        "alfa.config_hash": run.job.config_fingerprint,
    }
    buffer = io.BytesIO()
    table = table.replace_schema_metadata(provenance)
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        row_group_size=_ROWS_PER_GROUP,
        coerce_timestamps="us",
        write_page_index=True,
        sorting_columns=pq.SortingColumn.from_ordering(table.schema, _ORDER),
    )
    return buffer.getvalue()


def _entry(run: Run, manifest_digest: str, class_name: str, table: pa.Table, data: bytes) -> dict[str, Any]:
    run_date, sha256 = run.job.run_date, hashlib.sha256(data).hexdigest()
    anomalous = pc.sum(table.column("is_anomalous")).as_py() or 0
    errors = pc.value_counts(table.column("error_type").drop_null()).to_pylist()
    return {
        "class_name": class_name,
        "rows": table.num_rows,
        "errors": {entry["values"]: entry["counts"] for entry in errors},
        "anomalies": anomalous,
        "key": paths.version_key(run.run_id, manifest_digest, run_date, class_name, sha256),
        "table_key": paths.table_key(run_date, class_name),
        "bytes": len(data),
        "sha256": sha256,
    }


def _commit(run: Run, manifest_digest: str, folder: str, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "run_date": str(run.job.run_date),
        "run_id": run.run_id,
        "manifest": manifest_digest,
        "shards": folder,
        "rows": sum(entry["rows"] for entry in entries),
        "committed_at": datetime.now(timezone.utc).isoformat(),
        "files": list(entries),
    }
