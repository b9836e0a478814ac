"""Measures the time and memory to find the new photos among those that other nights hold, in addition to the listing.

The listing is simulated, with a thousand keys per page as from S3, so that nothing waits for a network. It has
`--known` photos in nights of 100,000, whose ledgers are on disk, and `--new` photos that are in none. Listing alone,
and planning (listing, ledgers, manifest of new photos), each run in their own process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.images import ImageSource, list_images
from pipeline.lake import Selection, find_ledgers, read_known
from pipeline.lake.ledger import build_ledger, describe_ledger
from pipeline.lake.sorting import regroup
from pipeline.scoring import write_manifest
from pipeline.storage import Page, Store, paths
from schemas.records import Commit, CommitFile, dump_record
from tests.bench.measuring import print_table, resident_bytes, write_results

A_NIGHT = 100_000
CLASSES = 12
PAGE = 1000
FIRST, TONIGHT = date(2025, 1, 1), date(2030, 1, 1)
FINGERPRINTS = {f"class-{number:02}": f"{number:032x}" for number in range(CLASSES)}


class MadeUpBucket(Store):
    """Lists photos that are nowhere."""

    def __init__(self, photos: int) -> None:
        super().__init__("s3://factory/photos")
        self.photos = photos

    def pages(self, prefix: str = "") -> Iterator[Page]:
        for first in range(0, self.photos, PAGE):
            numbers = range(first, min(first + PAGE, self.photos))
            keys = [f"class-{number % CLASSES:02}/line-{number % 7}/{number:09}.jpg" for number in numbers]
            yield Page(keys, [2_000_000] * len(keys), [f"{number:032x}" for number in numbers], [0.0] * len(keys))


def write_ledgers(output: Store, known: int) -> None:
    """Commits of nights, and the ledger of each."""
    listed = list_images(ImageSource(MadeUpBucket(known), "folders", None, None))
    tables = (pa.Table.from_batches([batch]).select(["class_name", "image_id"]) for batch in listed)
    for number, table in enumerate(regroup(tables, A_NIGHT)):
        write_night(output, FIRST + timedelta(days=number), table)


def write_night(output: Store, night: date, rows: pa.Table) -> None:
    rows = rows.append_column("status", pa.repeat(pa.scalar("ok"), rows.num_rows))
    tables = {name: rows.filter(pc.equal(rows.column("class_name"), name)) for name in FINGERPRINTS}
    files = [
        CommitFile(
            class_name=name, scored_as=FINGERPRINTS[name], rows=table.num_rows, errors={}, anomalies=0, key=name,
            table_key=name, bytes=0, sha256=hashlib.sha256(name.encode()).hexdigest(),
        )
        for name, table in tables.items()
    ]  # fmt: skip
    commit = Commit(
        run_date=night, run_id=f"{night}-{'a' * 12}", manifest="m", rows=rows.num_rows, files=tuple(files),
        committed_at=datetime.now(timezone.utc),
    )  # fmt: skip
    ledger = describe_ledger(commit, FINGERPRINTS)
    with tempfile.TemporaryDirectory() as scratch:
        build_ledger(((FINGERPRINTS[name], [table]) for name, table in tables.items()), Path(scratch, "ledger"))
        output.write(ledger.key, Path(scratch, "ledger"))
    output.write(paths.commit_key(night), dump_record(commit))


def list_alone(output: Store, source: ImageSource) -> dict[str, float]:
    deque(list_images(source), maxlen=0)
    return {}


def plan(output: Store, source: ImageSource) -> dict[str, float]:
    started = time.perf_counter()
    known = read_known(output, find_ledgers(output, but_for=TONIGHT), FINGERPRINTS, 4)
    read = time.perf_counter() - started
    selection = Selection()
    with tempfile.TemporaryDirectory() as scratch:
        manifest = write_manifest(known.leave_out(list_images(source), selection), Path(scratch))
    return {"ledger_s": read, "listed": selection.listed, "known": selection.scored, "new": manifest.images}


STEPS: dict[str, Callable[[Store, ImageSource], dict[str, float]]] = {"list": list_alone, "plan": plan}


def run_step(step: str, output: Store, photos: int) -> dict[str, float]:
    STEPS[step](output, ImageSource(MadeUpBucket(PAGE), "folders", None, None))  # modules are loaded at their first use
    imports = resident_bytes("VmRSS")
    started, started_cpu = time.perf_counter(), time.process_time()
    found = STEPS[step](output, ImageSource(MadeUpBucket(photos), "folders", None, None))
    seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    more = (resident_bytes("VmHWM") - imports) / 1e6
    return {**found, "seconds": seconds, "cpu_seconds": cpu, "imports_mb": imports / 1e6, "more_mb": more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--known", type=int, default=2_000_000)
    parser.add_argument("--new", type=int, default=10_000)
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step, folder, photos = options.step
        print(json.dumps(run_step(step, Store(folder), int(photos))))
        return
    facts: dict[str, object] = {}
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        write_ledgers(Store(folder), options.known)
        for step in STEPS:
            command = [sys.executable, "-m", "tests.bench.incremental", "--step", step, folder]
            command.append(str(options.known + options.new))
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            facts[step] = {key: round(value, 3) for key, value in found.items()}
            lines.append((step, *(f"{found[key]:,.1f}" for key in ("seconds", "cpu_seconds", "more_mb"))))
    print_table(
        f"{options.new:,} new photos, {options.known:,} in other nights",
        ("step", "s", "CPU s", "MB beyond imports"),
        lines,
    )
    write_results("incremental", facts)


if __name__ == "__main__":
    main()
