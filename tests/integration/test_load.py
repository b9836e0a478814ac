"""Tests many images and many shards: memory stays flat, and finished shards are found by one listing."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.storage import Store, paths
from schemas.job import Storage
from tests.command import COMMAND
from tests.fault_proxy import FaultProxy
from tests.nights import NIGHT
from tests.processes import find_processes
from tests.seaweed import ObjectStorage

IMAGES = 100_000
SHARD_SIZE = 256
NAMES_AN_IMAGE = 10
CLASSES = ("bolt", "nut", "pcb", "ring")
WARM_UP = 0.2


def write_images(root: Path, count: int) -> None:
    """Photos of 16 to 32 pixels a side, JPEG and PNG, in four classes; each lies there under ten names."""
    noise = np.random.default_rng(0)
    for class_name in CLASSES:
        (root / class_name).mkdir(parents=True)
    for number in range(count // NAMES_AN_IMAGE):
        height, width = noise.integers(16, 33, 2)
        stem = root / CLASSES[number % len(CLASSES)] / f"{number:05}"
        suffix = ("jpg", "png")[number // len(CLASSES) % 2]
        first = f"{stem}-0.{suffix}"
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(first)
        for copy in range(1, NAMES_AN_IMAGE):
            os.link(first, f"{stem}-{copy}.{suffix}")


def parent_of(pid: int) -> int:
    return int(re.findall(r"^PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0])


def descends(pid: int, ancestor: int) -> bool:
    while pid > 1 and pid != ancestor:
        pid = parent_of(pid)
    return pid == ancestor


def resident_mb(pid: int) -> int:
    return int(re.findall(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0]) // 1024


def sample_memory(driver: subprocess.Popen[str], shards: Path, every: int) -> Iterator[tuple[int, str, int]]:
    """(finished shards, process, MB resident), each time that about `every` more shards are finished."""
    due = every
    while driver.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(1.0)
        done = len(os.listdir(shards)) if shards.is_dir() else 0
        if done < due:
            continue
        due = done + every
        with contextlib.suppress(OSError):  # the run may end at any moment
            yield done, "driver", resident_mb(driver.pid)
            for pid in find_processes("^ray::ScoringActor"):
                if descends(pid, driver.pid):
                    yield done, "actor", resident_mb(pid)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_stays_flat_over_a_hundred_thousand_images(tmp_path: Path) -> None:
    images = IMAGES
    write_images(tmp_path / "in", images)
    command = [
        *COMMAND, "score", "--images", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--run-date", NIGHT,
        "--set", "model.image_size=28", "--set", f"engine.shard_size={SHARD_SIZE}", "--set", "engine.cpus_per_actor=1",
    ]  # fmt: skip
    shards = -(-images // SHARD_SIZE)
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, text=True) as driver:
        run = ""
        samples: dict[str, list[tuple[int, int]]] = {"driver": [], "actor": []}
        while not run and driver.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.wait(1.0)
            run = next((path.name for path in (tmp_path / "out" / "runs").glob(f"{NIGHT}-*") if path.is_dir()), "")
        for done, process, resident in sample_memory(driver, tmp_path / "out/runs" / run / "shards", shards // 50):
            samples[process].append((done, resident))
            print(f"{done} shards: {process} {resident} MB", flush=True)
        print(*(tmp_path / "log").read_text().splitlines()[-20:], sep="\n")
    assert driver.returncode == 0
    for process, curve in samples.items():
        warm = max(resident for done, resident in curve if done <= WARM_UP * shards)
        late = max(resident for done, resident in curve if done > WARM_UP * shards)
        assert late <= 1.1 * warm + 50, f"{process}: {curve}"
    rows = pq.read_table(tmp_path / "out" / paths.TABLE, columns=["image_id", "status", "mask_uri"])
    assert (rows.num_rows, len(rows.column("image_id").unique())) == (images, images)
    assert rows.column("status").unique().to_pylist() == ["ok"]
    masks = {Store(str(tmp_path / "out")).uri(info.key) for info in Store(str(tmp_path / "out")).list("masks")}
    assert masks == set(rows.column("mask_uri").to_pylist())


@pytest.mark.slow
def test_ten_thousand_finished_shards_are_found_by_one_listing(s3: ObjectStorage) -> None:
    folder = paths.run_key("run", "shards")
    ids = {f"{number:016x}" for number in range(10_000)}
    plain = Store("s3://lake/load-resume")
    with ThreadPoolExecutor(16) as writers:
        list(writers.map(lambda shard: plain.write(paths.shard_key(folder, shard), b"a shard"), ids))
    with FaultProxy(s3.endpoint, share=0.0) as proxy:
        store = Store("s3://lake/load-resume", Storage(endpoint_url=proxy.endpoint))
        assert paths.finished_shards(store, folder) == ids
        assert proxy.requests == len(ids) // 1000  # pages, and nothing else
