"""Writes generated rows as finished shards, without scoring anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa

from pipeline.storage import Run, Store, encode_shard, paths
from schemas.job import parse_job
from schemas.tables import SHARD

FIRST, SECOND, THIRD, FOURTH = "2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04"
NIGHT = SECOND
"""For tests of one night."""
WEIGHTS = "0" * 64
"""The SHA-256 of no weights."""


def run_of(output: Store, name: str, night: str = NIGHT, **keys: Any) -> Run:
    """A run of a night into this output. keys: of its job."""
    document = {"dataset": {"images": "x"}, "output": {"uri": output.uri("")}, "run_date": night, **keys}
    return Run(f"{night}-{name}", parse_job(document), "model", WEIGHTS)


def write_shard(output: Store, run: Run, shard_id: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as a finished shard of a run. What they do not say is the run's, and status ok; ids are keys."""
    made = [
        {
            "image_id": row["image_key"],
            "image_uri": row["image_key"],
            "run_id": run.run_id,
            "shard_id": shard_id,
            "status": "ok",
            "model": run.model,
            "weights_sha256": run.weights_sha256,
            "scored_at": datetime(2026, 1, 2, tzinfo=timezone.utc),
            **row,
        }
        for row in rows
    ]
    output.write(paths.shard_key(run.shards, shard_id), encode_shard(pa.Table.from_pylist(made, schema=SHARD)))
