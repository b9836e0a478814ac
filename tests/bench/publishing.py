"""Measures the end of a night in the driver, for a class with many rows.

The steps are publishing the finished shards, thresholds that follow from the scores, the report, and the comparison
with the night before. Each runs in its own process, so that peak memory can be measured; the memory of the imports is
shown beside it. First, `--rows` rows are written as shards, with maps of 196 patches and five prompts each, as in the
demo. `--kept FOLDER` writes them there, and keeps them for another run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console

from jobs.diff import run_diff
from pipeline.lake import publish_night, read_commit
from pipeline.report import load_report
from pipeline.scoring import quantile_thresholds
from pipeline.storage import Run, Store, encode_shard, paths, read_shards
from schemas.job import dump_job_yaml, parse_job
from schemas.tables import SHARD
from tests.bench.measuring import print_table, resident_bytes, write_results

SHARD_SIZE = 256
NIGHTS = ("2026-01-01", "2026-01-02")
PATCHES = 196
PATTERNS = 16
PROMPTS = 5


def make_run(output: Store, night: str) -> Run:
    job = parse_job({"dataset": {"images": output.uri("photos")}, "output": {"uri": output.uri("")}, "run_date": night})
    return Run(f"{night}-{'a' * 12}", job, "ViT-B-16-plus-240/laion400m_e32", "0" * 64)


def shard_name(number: int) -> str:
    return f"{number:016x}"


def write_shards(run: Run, output: Store, count: int) -> None:
    """Finished shards of one class; a tenth of the rows is anomalous, one in a hundred is an error."""
    output.write(paths.run_key(run.run_id, "job.yaml"), dump_job_yaml(run.job).encode())
    random = np.random.default_rng(int(run.run_id[8:10]))
    patterns = [
        pa.Table.from_pylist([_row(run, place, random) for place in range(SHARD_SIZE)], schema=SHARD)
        for _ in range(PATTERNS)
    ]
    for number in range(count):
        rows = _vary(patterns[number % PATTERNS], number, random)
        output.write(paths.shard_key(run.shards, shard_name(number)), encode_shard(rows))


def _vary(table: pa.Table, shard: int, random: np.random.Generator) -> pa.Table:
    """The rows of a pattern as photos of their own, with scores and maps of their own."""
    names = [f"hazelnut/{shard * SHARD_SIZE + place:09}.jpg" for place in range(SHARD_SIZE)]
    uris = [f"s3://factory/photos/2026/line-{shard % 7}/{name}" for name in names]
    masks = [f"s3://lake/inspection/masks/run_date={NIGHTS[1]}/aaaaaaaaaaaa/{name}.png" for name in names]
    scored = table.column("score").is_valid().to_numpy()
    score = np.where(scored, table.column("score").to_numpy() + random.uniform(0, 1e-3, SHARD_SIZE), np.nan)
    maps = pa.array(random.random(PATCHES * int(scored.sum()), np.float32))
    ends = np.concatenate([[0], np.cumsum(np.where(scored, PATCHES, 0))]).astype(np.int32)
    columns = {
        "image_key": pa.array(names),
        "image_uri": pa.array(uris),
        "image_id": pa.array([random.bytes(16).hex() for _ in names]),
        "image_etag": pa.array([random.bytes(16).hex() for _ in names]),
        "shard_id": pa.array([shard_name(shard)] * SHARD_SIZE),
        "score": pa.array(score, pa.float32(), from_pandas=True),
        "mask_uri": pa.array(masks),
        "grid": pa.ListArray.from_arrays(pa.array(ends), maps),
    }
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), SHARD.field(name), values)
    return table


def _row(run: Run, number: int, random: np.random.Generator) -> dict[str, object]:
    """A row of a pattern: what _vary does not set."""
    row: dict[str, object] = {
        "class_name": "hazelnut",
        "image_key": "",
        "image_id": "",
        "image_uri": "",
        "run_id": run.run_id,
        "shard_id": "",
        "prompt_source": "llm",
        "prompt_fingerprint": "0123456789ab",
        "model": run.model,
        "weights_sha256": run.weights_sha256,
        "scored_at": datetime(2026, 1, 2, tzinfo=timezone.utc),
    }
    if number % 100 == 0:
        return {
            **row,
            "status": "error",
            "error_type": "corrupt",
            "error_message": f"photo {number}: broken data stream",
        }
    score = float(random.beta(2, 5))
    region = {"x": 3, "y": 4, "width": 50, "height": 40, "area": 1500, "peak": score, "defect": "a hole in the shell"}
    evidence = [
        {
            "prompt": f"an object image of a damaged hazelnut with a mark of kind {place} that should not be there",
            "defect": f"mark of kind {place}",
            "weight": 0.02,
            "similarity": float(random.random()),
        }
        for place in range(PROMPTS)
    ]
    return {
        **row,
        "status": "ok",
        "width": 4000,
        "height": 3000,
        "score": score,
        "score_global": score,
        "score_local": score,
        "map_peak": score,
        "threshold": 0.55,
        "mask_threshold": 0.55,
        "threshold_source": "fixed",
        "is_anomalous": score >= 0.55,
        "mask_area": 0.01,
        "regions": [region] if score >= 0.55 else [],
        "explanation": evidence,
        "shots": 0,
        "prompts_kept_normal": 40,
        "prompts_kept_anomalous": 50,
        "prompts_kept": [True] * 90,
        "grid_width": 14,
        "defect_names": [],
        "defect_grid": [],
    }


def publish(output: Store, night: str, shards: list[str]) -> None:
    run = make_run(output, night)
    publish_night(run, "m" * 12, run.shards, shards, output, "bench", {"hazelnut": "a" * 32})


def find_thresholds(output: Store, night: str, shards: list[str]) -> None:
    columns = ["class_name", "score", "map_peak"]
    quantile_thresholds(read_shards(output, make_run(output, night).shards, shards, columns), 0.95)


def report(output: Store, night: str, shards: list[str]) -> None:
    commit = read_commit(output, night)
    assert commit is not None
    load_report(output, commit)


def diff(output: Store, night: str, shards: list[str]) -> None:
    run_diff(output, *NIGHTS, Console(quiet=True))


STEPS: dict[str, Callable[[Store, str, list[str]], None]] = {
    "publish": publish,
    "thresholds": find_thresholds,
    "report": report,
    "diff": diff,
}


def run_step(step: str, folder: str, night: str, count: int) -> dict[str, float]:
    imports = resident_bytes("VmRSS")
    started, started_cpu = time.perf_counter(), time.process_time()
    STEPS[step](Store(folder), night, [shard_name(number) for number in range(count)])
    seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    more = (resident_bytes("VmHWM") - imports) / 1e6
    return {"seconds": seconds, "cpu_seconds": cpu, "imports_mb": imports / 1e6, "more_mb": more}


def run_alone(step: str, folder: str, night: str, count: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.publishing", "--step", step, folder, night, str(count)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--kept", type=Path)
    parser.add_argument("--step", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step, folder, night, count = options.step
        print(json.dumps(run_step(step, folder, night, int(count))))
        return
    count = -(-options.rows // SHARD_SIZE)
    rows, facts, lines = count * SHARD_SIZE, {}, []
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(options.kept or scratch)
        output = Store(folder)
        for night in NIGHTS[0 if "diff" in options.steps else 1 :]:
            run = make_run(output, night)
            if not output.exists(paths.shard_key(run.shards, shard_name(count - 1))):
                write_shards(run, output, count)
        if "diff" in options.steps and read_commit(output, NIGHTS[0]) is None:
            run_alone("publish", folder, NIGHTS[0], count)
        for step in options.steps:
            found = run_alone(step, folder, NIGHTS[1], count)
            facts[step] = {key: round(value, 3) for key, value in found.items()}
            rates = [rows / found[key] for key in ("seconds", "cpu_seconds")]
            lines.append((step, f"{found['seconds']:.1f}", *(f"{value:,.0f}" for value in (*rates, found["more_mb"]))))
    columns = ("step", "s", "rows/s", "rows / CPU s", "MB beyond imports")
    print_table(f"a class of {rows:,} rows", columns, lines)
    write_results("publishing", {"rows": rows, **facts})


if __name__ == "__main__":
    main()
