"""Photos of earlier nights that fill up the peers of a small one."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from pipeline.lake import find_earlier, publish_night
from pipeline.storage import Store
from tests.nights import FIRST, SECOND, THIRD, run_of, write_shard


def publish(output: Store, night: str, name: str) -> None:
    """Five photos of nuts: the first is anomalous, the last is an error."""
    run = run_of(output, name, night)
    rows = [
        {"class_name": "nut", "image_key": f"{name}-{number}", "image_etag": "v1", "is_anomalous": number == 0}
        for number in range(4)
    ]
    failed = {"class_name": "nut", "image_key": f"{name}-4", "status": "error", "error_type": "corrupt"}
    write_shard(output, run, "one", [*rows, failed])
    publish_night(run, "m", run.shards, ["one"], output, "test")


def test_the_latest_nights_come_first_without_errors_and_anomalies(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    publish(output, FIRST, "old")
    publish(output, SECOND, "new")
    publish(output, THIRD, "tonight")
    found = find_earlier(output, date.fromisoformat(THIRD), {"nut": 5, "bolt": 5})
    assert [row["image_id"] for row in found["nut"]] == ["new-1", "new-2", "new-3", "old-1", "old-2"]
    assert found["nut"][0] == {"image_id": "new-1", "uri": "new-1", "etag": "v1"} and list(found) == ["nut"]
    assert find_earlier(output, date.fromisoformat(FIRST), {"nut": 5}) == {}
