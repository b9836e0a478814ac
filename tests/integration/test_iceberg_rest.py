"""A night on a real S3 with a real Iceberg REST catalog (SeaweedFS), through the command line, killed on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from pyiceberg.catalog import load_catalog

from pipeline.storage import Store
from tests.command import alfa_alone
from tests.nights import NIGHT
from tests.places import DEMO
from tests.seaweed import SECRET_KEY, ObjectStorage


@pytest.mark.slow
def test_a_driver_killed_between_commit_and_snapshot_is_resumed(
    s3: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.iceberg_environment("factory").items():
        monkeypatch.setenv(name, value)
    photos, output = Store("s3://lake/iceberg-in"), Store("s3://lake/iceberg-out")
    for number in range(2):
        photos.write(f"hazelnut/{number}.jpg", (DEMO / f"hazelnut/test/good/0{number}.jpg").read_bytes())
    arguments = [
        "score", "--images", photos.uri(""), "--output", output.uri(""), "--run-date", NIGHT,
        "--set", "engine.lease_s=1",
        "--set", "lake.format=iceberg", "--set", "lake.catalog=factory", "--set", "lake.table=inspection.scores",
    ]  # fmt: skip
    command = [sys.executable, "-m", "tests.killed_driver", "after:^commits/:1", *arguments]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    commit = json.loads(output.read(f"commits/{NIGHT}.json"))
    catalog = load_catalog("factory", **s3.iceberg_properties)
    assert not catalog.table_exists("inspection.scores")
    for _ in range(2):
        again = alfa_alone(*arguments)
        assert again.returncode == 0, again.stderr
        assert "already published" in again.stderr and SECRET_KEY not in again.stderr + again.stdout
    table = catalog.load_table("inspection.scores")
    (snapshot,) = table.snapshots()
    assert snapshot.summary is not None and snapshot.summary["alfa.run_id"] == commit["run_id"]
    rows = table.scan(f"run_date = '{NIGHT}' and class_name = 'hazelnut'").to_arrow().to_pylist()
    assert sorted(row["image_uri"] for row in rows) == [photos.uri(f"hazelnut/{number}.jpg") for number in range(2)]
    assert SECRET_KEY.encode() not in b"".join(output.read(info.key) for info in output.list("runs"))
