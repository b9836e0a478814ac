"""What planning a night costs: a folder of empty files, and a Parquet table, to the manifest and its shards.

Each is planned in a process of its own, so that its peak memory is its own. `--files` and `--rows` set how many.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.images import list_images, open_dataset
from pipeline.shards import HASHED, cut_shards, identify_shards, write_manifest
from schemas.job import Dataset, Storage
from tests.bench.measuring import print_table, write_results

FILES_A_CLASS = 50_000
SHARD_SIZE = 256


def write_files(root: Path, count: int) -> None:
    """Empty files root/class-N/M.jpg."""
    for number in range(count):
        folder = root / f"class-{number // FILES_A_CLASS:03}"
        if number % FILES_A_CLASS == 0:
            folder.mkdir(parents=True)
        os.close(os.open(f"{folder}/{number:08}.jpg", os.O_CREAT | os.O_WRONLY))


def write_rows(path: Path, count: int) -> None:
    """A table of uris and classes, as a data platform would export it."""
    schema = pa.schema([("uri", pa.string()), ("class_name", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, count, FILES_A_CLASS):
            numbers = range(first, min(first + FILES_A_CLASS, count))
            uris = [f"s3://factory/photos/line-{number % 7}/{number:08}.jpg" for number in numbers]
            writer.write_table(pa.table([uris, [f"class-{number % 12:03}" for number in numbers]], schema=schema))


def plan(images: str) -> dict[str, float]:
    """Lists, writes the manifest, identifies the shards and cuts them, as a run does. Seconds, and MB at the peak."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, started_cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        manifest = write_manifest(list_images(open_dataset(Dataset(images=images), Storage())), Path(scratch))
        shards = len(list(identify_shards(manifest.batches(HASHED), SHARD_SIZE)))
        deque(cut_shards(manifest.batches(), SHARD_SIZE), maxlen=0)
    seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "images": manifest.images,
        "shards": shards,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "imports_mb": before // 1024,
        "peak_mb": peak // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        print(json.dumps(plan(options.plan)))
        return
    facts: dict[str, object] = {}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        write_files(Path(scratch) / "files", options.files)
        write_rows(Path(scratch) / "rows.parquet", options.rows)
        for name in ("files", "rows.parquet"):
            command = [sys.executable, "-m", "tests.bench.planning", "--plan", f"{scratch}/{name}"]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            facts[name] = found
            rates = (found["images"] / found[key] for key in ("seconds", "cpu_seconds"))
            sizes = (found["peak_mb"], found["imports_mb"])
            rows.append((name, str(found["images"]), *(f"{rate:,.0f}" for rate in rates), *map(str, sizes)))
    columns = ("source", "images", "images/s", "images / CPU s", "peak MB", "of it imports")
    print_table("planning a night", columns, rows)
    write_results("planning", facts)


if __name__ == "__main__":
    main()
