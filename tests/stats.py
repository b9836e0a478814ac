"""Invented stats of a run."""

from __future__ import annotations

import json
from typing import Any

from pipeline.storage import Store, paths


def write_stats(output: Store, run_id: str, **facts: Any) -> None:
    """Writes the stats.json of a run that is done, as any version of alfa may have written it."""
    known = {"run_id": run_id, "state": "done", "updated_at": "2026-01-02T03:00:00+00:00", "images": 1, "shards": 1}
    document = {**known, "errors": {}, "anomalies": {}, **facts}
    output.write(paths.run_key(run_id, "stats.json"), json.dumps(document).encode())
