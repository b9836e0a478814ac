"""An output that is full or read-only: one clear line, and the same command resumes once there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.storage import Store, StoreError
from tests.command import alfa, alfa_alone
from tests.places import DEMO

Remount = Callable[[str], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Remount]]:
    """A small disk of its own, and how to mount it with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True)

    try:
        mount("size=160k")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk needs the right to mount one: {error}")
    yield folder, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_night_with_one_line_and_room_resumes_it(disk: tuple[Path, Remount]) -> None:
    output, remount = disk
    night = (
        "score", "--images", DEMO, "--layout", "mvtec", "--output", output, "--run-date", "2026-01-02",
        "--set", "engine.shard_size=4", "--set", "engine.lease_s=1", "--set", "output.maps=true",
    )  # fmt: skip
    stopped = alfa_alone(*night)
    assert stopped.returncode == 1 and "the disk is full; free space" in stopped.stderr, stopped.stderr
    assert "run the same command again to resume" in stopped.stderr and "Traceback" not in stopped.stderr
    assert not (output / "scores").exists() and not (output / "commits").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in output.glob("runs/*/shards/*.arrow")}
    remount("size=50m")
    again = alfa_alone(*night)
    assert again.returncode == 0, again.stderr
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("runs/*/shards/*.arrow")}
    # of six shards of four photos, the last is cut in four
    assert len(after) == 5 + 4 and {name: after[name] for name in finished} == finished
    rows = [row for path in output.glob("scores/**/*.parquet") for row in pq.read_table(path).to_pylist()]
    assert len(rows) == 24 and all(Path(row["mask_uri"]).stat().st_size for row in rows)
    assert not any(path.stat().st_size == 0 for path in output.rglob("*.png"))


def test_a_read_only_output_is_said_before_anything_is_done(disk: tuple[Path, Remount]) -> None:
    output, remount = disk
    remount("ro")
    refused = alfa("score", "--images", DEMO, "--layout", "mvtec", "--output", output)
    assert refused.returncode == 1 and "read-only; mount it writable" in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr
    with pytest.raises(StoreError, match="read-only"):
        Store(str(output)).create("a/b", b"")
