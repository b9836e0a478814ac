import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from pipeline.storage import Store, paths, read_shard
from schemas.tables import ErrorType
from tests.images.hostile import hostile_files

PIXELS = 4_000_000
BYTES_A_PIXEL = 25
"""What decoding or masking takes at most; see pipeline.memory.PIXELS."""
SLACK = 450_000_000
"""Files being read, encoded masks, and what the allocator keeps for eight threads, however many files there are.

The peak was 275 to 445 MB in nine runs; it depends on which files are decoded at the same time.
"""

DAMAGED = ("-cut-", "-flip-", "-hole.", "-tail.", "-named.")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("share", [160, pytest.param(1, marks=pytest.mark.slow)])
def test_whatever_the_bytes_are_they_have_one_row_and_memory_is_bounded(share: int, tmp_path: Path) -> None:
    """share: of the damaged files every so many-th is scored; a process of its own does it, with eight threads."""
    folder = tmp_path / "in" / "nut"
    folder.mkdir(parents=True)
    files = dict(hostile_files())
    assert len(files) > 3000
    for number, (name, data) in enumerate(files.items()):
        if number % share == 0 or not any(word in name for word in DAMAGED):
            (folder / name).write_bytes(data)
    command = [sys.executable, "-m", "tests.images.score_hostile"]
    done = subprocess.run([*command, folder.parent, tmp_path / "out", str(PIXELS)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    output, folder_of_shards = Store(str(tmp_path / "out")), "runs/hostile/shards"
    tables = [read_shard(output, folder_of_shards, name) for name in paths.finished_shards(output, folder_of_shards)]
    rows = [row for table in tables for row in table.to_pylist()]
    outcomes = Counter(row["error_type"] or "ok" for row in rows)
    print(f"{len(rows)} files, {outcomes}, {figures}")
    assert sorted(row["image_key"] for row in rows) == sorted(f"nut/{path.name}" for path in folder.iterdir())
    assert set(outcomes) <= {"ok", *(kind.value for kind in ErrorType)} - {
        "vanished",
        "unreadable",
        "crashed",
        "internal",
    }
    for row in rows:
        if row["status"] == "ok":
            with Image.open(row["mask_uri"]) as mask:
                assert (mask.size, mask.mode) == ((row["width"], row["height"]), "L")
        else:
            assert row["error_message"] and row["error_message"].isprintable() and row["mask_uri"] is None
    ok = {Path(row["image_key"]).name for row in rows if row["status"] == "ok"}
    assert {"wrong-exif.jpg", "turned-wrong-exif.jpg", "large-rgba-16.png", "rgb16.png", "bigtiff.tif"} <= ok
    assert figures["peak"] < BYTES_A_PIXEL * PIXELS + SLACK
