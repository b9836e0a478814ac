"""Publishes finished shards: the scores table, commits, ledgers, Iceberg, DDL, exports, garbage collection, metrics.

In: finished shards, counts of a run. Out: the scores table, commits, exports, OpenLineage and Prometheus records.
May import: images, storage, schemas.
"""

from pipeline.lake.commits import find_night_before, published_nights, read_commit, read_stats
from pipeline.lake.ddl import DIALECTS, render_ddl
from pipeline.lake.earlier import find_earlier
from pipeline.lake.exports import FORMATS, ExportError, export_rows, find_night, read_rows
from pipeline.lake.garbage import Retention, collect_garbage, find_oldest_kept
from pipeline.lake.iceberg import LakeError, open_catalog, publish_snapshot
from pipeline.lake.ledger import (
    KnownPhotos,
    Ledger,
    Selection,
    State,
    check_ledger,
    find_ledgers,
    read_known,
    rebuild_ledger,
    write_ledger,
)
from pipeline.lake.lineage import run_event
from pipeline.lake.metrics import exposition
from pipeline.lake.publish import publish_night
from pipeline.lake.reading import read_groups, take_rows

__all__ = [
    "DIALECTS",
    "FORMATS",
    "ExportError",
    "KnownPhotos",
    "LakeError",
    "Ledger",
    "Retention",
    "Selection",
    "State",
    "check_ledger",
    "collect_garbage",
    "export_rows",
    "exposition",
    "find_earlier",
    "find_ledgers",
    "find_night",
    "find_night_before",
    "find_oldest_kept",
    "open_catalog",
    "publish_night",
    "publish_snapshot",
    "published_nights",
    "read_commit",
    "read_groups",
    "read_known",
    "read_rows",
    "read_stats",
    "rebuild_ledger",
    "render_ddl",
    "run_event",
    "take_rows",
    "write_ledger",
]
