"""Measures the cost of reading and writing objects on S3 (SeaweedFS on this machine), as actors do for each photo.

Compared are Store (obstore, in Rust), s3fs, to which Store falls back, and Arrow's client (C++), which sends two
requests per object. s3fs spends nearly all of its time in Python, of which a process runs only one thread at a time, so
it limits what an actor can read and write, however many threads it has.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow.fs import S3FileSystem

from pipeline.storage import Store
from tests.bench.measuring import measure, print_table, write_results
from tests.seaweed import run_seaweed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=400)
    parser.add_argument("--size", type=int, default=43_000, help="bytes of an object; default: a JPEG of 512 x 512")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    data = os.urandom(options.size)
    keys = [f"{number:05}.jpg" for number in range(options.objects)]
    with tempfile.TemporaryDirectory() as scratch, run_seaweed(Path(scratch)) as server:
        os.environ.update(server.environment)
        store, endpoint = Store("s3://lake/bench"), urlsplit(server.endpoint)
        arrow = S3FileSystem(
            endpoint_override=endpoint.netloc, scheme=endpoint.scheme, region="us-east-1", allow_delayed_open=True
        )

        def read_by_arrow(key: str) -> bytes:
            with arrow.open_input_stream(f"lake/bench/{key}") as file:
                return bytes(file.read())

        def write_by_arrow(key: str) -> None:
            with arrow.open_output_stream(f"lake/bench/{key}") as file:
                file.write(data)

        cpu_s: dict[str, float] = {}

        def run(name: str, call: Callable[[str], object], pool: ThreadPoolExecutor) -> None:
            before = time.process_time()
            deque(pool.map(call, keys), maxlen=0)
            cpu_s[name] = time.process_time() - before

        calls: dict[str, Callable[[str], object]] = {
            "write, Store": lambda key: store.write(key, data),
            "write, s3fs": lambda key: store.fs.pipe_file(f"lake/bench/{key}", data),
            "write, Arrow": write_by_arrow,
            "read, Store": store.read,
            "read, s3fs": lambda key: store.fs.cat_file(f"lake/bench/{key}"),
            "read, Arrow": read_by_arrow,
        }
        with ThreadPoolExecutor(options.threads) as pool:
            runs = {name: functools.partial(run, name, call, pool) for name, call in calls.items()}
            seconds = measure(runs, options.repetitions)
    rows = [
        (name, f"{options.objects / value:.0f}", f"{cpu_s[name] / options.objects * 1e3:.2f}")
        for name, value in seconds.items()
    ]
    title = f"{options.objects} objects of {options.size:,} bytes, {options.threads} threads, SeaweedFS beside them"
    print_table(title, ("run", "objects/s", "ms of a core"), rows)
    write_results("storage", {**vars(options), "seconds": seconds, "cpu_seconds": cpu_s})


if __name__ == "__main__":
    main()
