"""Tests nights that lose the head of their cluster while the driver runs on another node."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.nights import NIGHT
from tests.places import DEMO
from tests.pools import await_it
from tests.processes import kill_processes
from tests.ray_head import run_node
from tests.seaweed import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

NODE_IP = "127.0.0.2"

DRIVER = f"""
import functools, ray
ray.init = functools.partial(ray.init, _node_ip_address="{NODE_IP}")  # else it would choose the head's node
from jobs.cli import main
main()
"""

HELD = """
import os, time
from PIL import BmpImagePlugin
opened = BmpImagePlugin.BmpImageFile._open
def hold(self):
    while True: time.sleep(1)
BmpImagePlugin.BmpImageFile._open = hold
"""
"""A decoder that never ends, so that the night does not end before the head has been lost."""


@contextlib.contextmanager
def run_cluster(port: int, **of_workers: str) -> Iterator[Path]:
    """A head without cores on this port, and a node with two; yields the head's folder."""
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(run_head(port))
        stack.enter_context(run_worker(port, **of_workers))
        yield head


def run_head(port: int) -> contextlib.AbstractContextManager[Path]:
    return run_node("--head", "--num-cpus=0", "--node-ip-address=127.0.0.1", f"--port={port}")


def run_worker(port: int, **environment: str) -> contextlib.AbstractContextManager[Path]:
    options = (f"--address=127.0.0.1:{port}", "--num-cpus=2", f"--node-ip-address={NODE_IP}")
    return run_node(*options, **environment)


def start(images: Path, output: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    engine = ("engine.shard_size=1", "engine.lease_s=1", "engine.cpus_per_actor=1")
    sets = (*engine, "threshold.policy=quantile", "model.image_size=98")
    overrides = [part for override in sets for part in ("--set", override)]
    command = ["score", "--images", str(images), "--output", str(output), "--run-date", NIGHT, *overrides]
    environment = {
        **os.environ,
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "35",  # of which alfa waits 15
        "COLUMNS": "200",
    }
    with log.open("wb") as target:
        return subprocess.Popen([sys.executable, "-c", DRIVER, *command], env=environment, stdout=target, stderr=target)


def finished(output: Path) -> int:
    return len(list(output.glob("runs/*/shards/*.arrow")))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve photos of the demo, and one of another class, for the decoder of BMP."""
    folder = tmp_path / "images"
    for name in ("hazelnut", "wood"):
        (folder / name).mkdir(parents=True)
    for path in DEMO.glob("hazelnut/test/*/*.jpg"):
        (folder / "hazelnut" / f"{path.parts[-2]}-{path.name}").write_bytes(path.read_bytes())
    Image.new("RGB", (64, 64), (90, 60, 30)).save(folder / "wood" / "a.bmp")
    return folder


@pytest.mark.parametrize(
    ("comes_back", "said"),
    [(False, "has not answered for "), (True, "was started again, and has lost this job")],
    ids=["gone", "started again"],
)
def test_a_night_that_loses_the_head_says_so_and_the_next_one_resumes(
    comes_back: bool, said: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    output, log, site, (port,) = tmp_path / "out", tmp_path / "log", tmp_path / "site", free_ports(1)
    site.mkdir()
    (site / "sitecustomize.py").write_text(HELD)
    with contextlib.ExitStack() as stack:
        with run_cluster(port, PYTHONPATH=f"{site}:{Path.cwd()}") as head:
            driver = start(images, output, port, log)
            await_it(lambda: finished(output) >= 3 or driver.poll() is not None)
            kill_processes(str(head))
            if comes_back:
                stack.enter_context(run_head(port))
            assert driver.wait(60) == 1, log.read_text()
        kept = finished(output)
        lines = log.read_text().splitlines()
        assert said in lines[-2] and "run the same command again" in lines[-1]
        assert "Traceback" not in log.read_text() and "rpc_client" not in log.read_text()
        if not comes_back:
            stack.enter_context(run_head(port))
        stack.enter_context(run_worker(port))
        again = start(images, output, port, log)
        assert again.wait(120) == 0, log.read_text()
    assert f"{kept} of 13 shards are finished already" in log.read_text()
    tables = [pq.read_table(path, partitioning=None) for path in output.glob("scores/**/*.parquet")]
    rows = pa.concat_tables(tables).to_pylist()
    assert sorted(Path(row["image_uri"]).name for row in rows) == sorted(path.name for path in images.rglob("*.*"))
    assert {row["status"] for row in rows} == {"ok"}
