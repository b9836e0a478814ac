"""Ray heads and nodes for tests, in processes and folders of their own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import kill_processes
from tests.seaweed import free_ports


@dataclass(frozen=True)
class Head:
    """A running head. address: of its job server; gcs: what drivers join; folder: what it writes; environment: what
    its clients need to be let in."""

    address: str
    gcs: str
    folder: Path
    environment: dict[str, str]

    def joined_by_default(self) -> str:
        """The address that a `ray.init()` without one would join, were RAY_TMPDIR this head's folder."""
        return (self.folder / "ray" / "ray_current_cluster").read_text().strip()

    def kill(self) -> None:
        """SIGKILL to all of its processes: its files stay."""
        kill_processes(str(self.folder))

    def jobs(self) -> dict[str, dict[str, Any]]:
        """What the head knows of submitted jobs, by their submission ids."""
        # Ray's own client reads the token once a process; this one belongs to other tests too.
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.address}/api/jobs/", headers=token)) as answer:
            return {job["submission_id"]: job for job in json.load(answer)}


def auth_mode() -> str:
    """Returns the mode of a head that this process joins.

    The first `ray.init` that starts a Ray sets it to token for the rest of the process. A head of another mode could
    not ask the process which actors it still wants, and would end them all.
    """
    return os.environ.get("RAY_AUTH_MODE", "disabled")


@contextlib.contextmanager
def run_head(cpus: int = 2) -> Iterator[Head]:
    """`ray start --head`; stopped at the end, with all that it started."""
    port, dashboard, agent, client = free_ports(4)
    folder = Path(tempfile.mkdtemp(prefix="alfa-ray-", dir="/tmp"))  # Unix sockets lie below it: it must be short
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    options = [
        "--head", f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1", f"--port={port}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
    ]  # fmt: skip
    # The nodes have alfa's dependencies; its code comes with the job.
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    nodes = {
        **inherited,
        **environment,
        "PATH": f"{Path(sys.executable).parent}:{inherited['PATH']}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch that keeps all servers on the loopback address
    }
    with start_ray(folder, options, nodes) as (server, log):
        head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", folder, environment)
        _await_answer(head, server, log)
        yield head


@contextlib.contextmanager
def start_ray(
    folder: Path, options: Sequence[str], environment: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Runs `ray start` with these options in a folder, and yields the process and its log.

    At the end, all that it has started is stopped, and the folder is removed.
    """
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
    log = folder / "ray.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, f"--temp-dir={folder / 'ray'}", *options],
            env=environment,
            cwd=folder,
            stdout=output,
            stderr=output,
        )
    try:
        yield server, log
    finally:
        server.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        server.kill()
        server.wait()
        kill_processes(str(folder))
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def run_node(*options: str, below: str = "/tmp", **environment: str) -> Iterator[Path]:
    """Starts a node, with or without `--head`, and yields its folder once it runs. It has no dashboard.

    below: where the folder is made; all that the node and its workers write goes there. Unix sockets lie below it, too,
    so it must be short.
    """
    (agent,) = free_ports(1)
    folder = Path(tempfile.mkdtemp(prefix="node-", dir=below))
    environment["TMPDIR"] = str(folder)
    settings = ["--include-dashboard=false"] if "--head" in options else []
    ports = f"--dashboard-agent-listen-port={agent}"
    with start_ray(folder, [*options, *settings, ports], {**os.environ, **environment}) as (server, log):
        await_start(server, log)
        yield folder


def await_start(server: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when `ray start` says that the node runs."""
    while b"Ray runtime started" not in log.read_bytes():
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(0.2)
            raise RuntimeError(f"the node did not come up: {log.read_text(errors='replace')[-2000:]}")


def _await_answer(head: Head, server: subprocess.Popen[bytes], log: Path, limit_s: float = 90.0) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError):
            head.jobs()
            head.joined_by_default()
            return
        time.sleep(0.2)
    raise RuntimeError(f"the Ray head did not come up: {log.read_text(errors='replace')[-2000:]}")
