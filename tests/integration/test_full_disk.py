"""Tests the scoring pool where the disk of one node is really full: a small file system, filled to its last byte."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.engine import obtain_prompts
from schemas.job import parse_job
from tests.places import ROOT
from tests.pools import make_pool, score
from tests.ray_head import auth_mode, run_node
from tests.seaweed import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

NAMES = [f"works-{number:03}" for number in range(100)]


PAGE = 4096
"""What a log file may still have room for, on a file system without a free byte. A warning is longer than 64 bytes."""


@dataclass(frozen=True)
class Nodes:
    """A head without cores, and two nodes with one each. full_ip: of that which has all its files on the small disk."""

    address: str
    full_ip: str
    disk: Path

    def fill(self) -> None:
        """Leaves no byte on the small disk."""
        for number, size in enumerate((2**20, 1)):
            with contextlib.suppress(OSError), (self.disk / f"filler-{number}").open("wb", buffering=0) as file:
                while file.write(bytes(size)):
                    pass

    def join(self, **options: Any) -> str:
        """Connects this process. Returns the id of the node with the small disk."""
        ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR, **options)
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        return next(str(node["NodeID"]) for node in nodes if node["NodeManagerAddress"] == self.full_ip)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    ray.shutdown()  # that of other tests
    monkeypatch.setenv("RAY_AUTH_MODE", auth_mode())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    disk = Path(tempfile.mkdtemp(prefix="disk-", dir="/tmp"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        disk.rmdir()
        pytest.skip("no file system can be mounted here")
    (port,) = free_ports(1)
    address, full_ip = f"127.0.0.1:{port}", "127.0.0.3"
    joins = (f"--address={address}", "--num-cpus=1")
    try:
        with contextlib.ExitStack() as stack:
            for options, folder in (
                (("--head", "--num-cpus=0", "--node-ip-address=127.0.0.1", f"--port={port}"), "/tmp"),
                ((*joins, "--node-ip-address=127.0.0.2"), "/tmp"),
                ((*joins, f"--node-ip-address={full_ip}"), str(disk)),
            ):
                stack.enter_context(run_node(*options, below=folder))
            yield Nodes(address, full_ip, disk)
            ray.shutdown()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
        disk.rmdir()


@pytest.mark.parametrize("uploads", [False, True], ids=["code is there", "code is uploaded"])
def test_a_node_on_whose_disk_no_actor_can_start_is_excluded(
    uploads: bool, nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Uploaded code has to be unpacked on the node, as that of alfa submit."""
    nodes.fill()
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "data").write_bytes(bytes(2**20))
    full = nodes.join(runtime_env={"working_dir": str(tmp_path / "code")} if uploads else {})
    assert score(make_pool(nodes.address, tmp_path, len(NAMES), actors=2), NAMES) == NAMES
    (said,) = (message for message in caplog.messages if "is excluded" in message)
    assert f"node {full[:12]} is excluded, and others do its work: 2 workers died there" in said
    assert not uploads or "No space left on device" in said


def test_prompts_are_obtained_beside_the_driver(nodes: Nodes, tmp_path: Path) -> None:
    """Not on any node that has room for an actor without cores."""
    nodes.fill()
    nodes.join(_node_ip_address="127.0.0.1")
    job = parse_job({"dataset": {"images": "x"}, "output": {"uri": str(tmp_path)}, "engine": {"max_restarts": 0}})
    for number in range(6):
        (found,) = obtain_prompts(job, ["bolt"], f"job {number}")
        assert found.class_name == "bolt"


def test_a_node_whose_disk_fills_up_goes_on_and_its_warnings_arrive(
    nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its actor cannot write its log any more."""
    full = nodes.join()
    pool = make_pool(nodes.address, tmp_path, 10_000, actors=2)

    def fill() -> Iterator[str]:
        nodes.fill()
        yield from ()

    names = [f"warns-{number:05}" for number in range(10_000)]
    until_placed = takewhile(lambda _: pool.placed.count < 2, (f"works-{number:05}" for number in count()))
    until_warned = takewhile(lambda _: caplog.text.count(f"on node {full}") < PAGE // 64, names)
    done = score(pool, chain(until_placed, fill(), until_warned))
    warned = [name for name in done if name.startswith("warns")]
    assert warned == names[: len(warned)] and caplog.text.count(f"on node {full}") >= PAGE // 64
    assert "is excluded" not in caplog.text
