"""Measures the planning of a night: from a folder of empty files, or a Parquet table, to the manifest and shard ids.

That is all that happens before the first image is scored; the shards themselves are cut while others are scored. Each
is planned in its own processes, so that peak memory can be measured. `--files` and `--rows` set their numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.images import list_images, open_dataset
from pipeline.scoring import cut_shards, identify_shards, write_manifest
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
    """Plans as a run does. Seconds until the first shard can be scored, and for cutting all of them, which is done
    beside the scoring; MB before, and at the peak."""
    imports_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as scratch:
        started, started_cpu = time.perf_counter(), time.process_time()
        manifest = write_manifest(list_images(open_dataset(Dataset(images=images), Storage())), Path(scratch))
        shards = len(identify_shards(manifest, SHARD_SIZE))
        planned, planned_cpu = time.perf_counter(), time.process_time()
        deque(cut_shards(manifest, SHARD_SIZE), maxlen=0)
        cut = time.perf_counter()
    return {
        "images": manifest.images,
        "shards": shards,
        "plan_s": planned - started,
        "plan_cpu_s": planned_cpu - started_cpu,
        "cut_s": cut - planned,
        "imports_mb": imports_kb / 1024,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def plan_warm(images: Path, few: Path) -> dict[str, float]:
    """plan, in a process of its own that has planned `few` images before, as modules are loaded at their first use."""
    command = [sys.executable, "-m", "tests.bench.planning", "--plan", str(few), str(images)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=300_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--plan", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        few, images = options.plan
        plan(few)
        print(json.dumps(plan(images)))
        return
    facts: dict[str, object] = {}
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        files, rows, few = Path(scratch, "files"), Path(scratch, "rows.parquet"), Path(scratch, "few")
        write_files(few, 1)
        write_files(files, options.files)
        write_rows(rows, options.rows)
        runs: dict[str, list[dict[str, float]]] = {files.name: [], rows.name: []}
        for _ in range(options.repetitions):
            for images in (files, rows):
                runs[images.name].append(plan_warm(images, few))
    for name, found in runs.items():
        median = {key: statistics.median(run[key] for run in found) for key in found[0]}
        rates = [round(median["images"] / median[key]) for key in ("plan_s", "plan_cpu_s", "cut_s")]
        sizes = [round(median[key]) for key in ("peak_mb", "imports_mb")]
        facts[name] = {key: round(value, 3) for key, value in median.items()}
        lines.append((name, *(f"{value:,}" for value in (round(median["images"]), *rates, *sizes))))
    columns = ("source", "images", "planned/s", "planned / CPU s", "cut/s", "peak MB", "of it imports")
    print_table(f"planning a night, medians of {options.repetitions}", columns, lines)
    write_results("planning", facts)


if __name__ == "__main__":
    main()
