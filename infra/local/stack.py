"""An object store and a Ray head on this machine, for `make local-up` and `make local-down`.

Everything listens on the loopback address, at the usual ports: S3 on 8333, Ray's job server and dashboard on 8265. What
they write, and who they are (processes.json), lies in out/local, with the environment of their clients (env).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fsspec
import yaml

FOLDER = Path("out/local")
PHOTOS = Path("infra/demo/images")
BIN = Path(sys.executable).parent
S3, DASHBOARD = 8333, 8265
WEED_PORTS = (S3, 9333, 9340, 8888, 8181)
"""S3, and what `weed mini` takes besides: master, volume server, filer, Iceberg catalog."""
LIMIT_S = 90.0


class StackError(RuntimeError):
    """The stack cannot be started; the message says why and what to do."""


def start() -> None:
    """Starts both servers, fills the bucket with the demo's photos, writes a job file, and prints what to do next."""
    if (FOLDER / "processes.json").exists():
        raise StackError(f"{FOLDER}/processes.json is there: stop what runs with `make local-down` first")
    taken = [port for port in (*WEED_PORTS, DASHBOARD) if _answers(port)]
    if taken:
        raise StackError(f"something listens on port {', '.join(map(str, taken))} already; stop it first")
    (FOLDER / "store").mkdir(parents=True, exist_ok=True)
    keys = {
        "AWS_ACCESS_KEY_ID": "local",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{S3}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{DASHBOARD}",
    }
    _write_environment(keys)
    # Unix sockets lie below Ray's folder, and their paths must be short.
    ray_folder = tempfile.mkdtemp(prefix="alfa-ray-", dir="/tmp")
    processes = {"weed": _start_weed(keys).pid, "ray": _start_ray(keys, ray_folder).pid}
    (FOLDER / "processes.json").write_text(json.dumps({**processes, "ray_folder": ray_folder}))
    try:
        for name, port in (("weed", S3), ("ray", DASHBOARD)):
            _await_port(name, port, processes[name])
        _seed(keys)
    except BaseException:
        stop()
        raise
    print(
        f"The bucket s3://lake holds the demo's photos; the dashboard is at http://127.0.0.1:{DASHBOARD}.\n"
        f"  source {FOLDER}/env\n"
        f"  alfa submit {FOLDER}/job.yaml\n"
        f"What comes next is in infra/local/README.md; `make local-down` stops it all."
    )


def stop() -> None:
    """Stops what start() has started and removes what it has written; does nothing where nothing was started."""
    with contextlib.suppress(FileNotFoundError):
        processes = json.loads((FOLDER / "processes.json").read_text())
        for name in ("ray", "weed"):
            _end(processes[name])
        shutil.rmtree(processes["ray_folder"], ignore_errors=True)
    shutil.rmtree(FOLDER, ignore_errors=True)


def _write_environment(keys: dict[str, str]) -> None:
    path = FOLDER / "env"
    path.touch(mode=0o600)
    lines = [f"export {name}={value}\n" for name, value in keys.items()]
    path.write_text("".join([*lines, f'export PATH="{BIN}:$PATH"\n']))


def _start_weed(keys: dict[str, str]) -> subprocess.Popen[bytes]:
    return _spawn(
        "weed", ["mini", f"-dir={FOLDER / 'store'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false",
                 "-admin.ui=false", "-bucket=lake"],
        {**os.environ, **keys},
    )  # fmt: skip


def _start_ray(keys: dict[str, str], folder: str) -> subprocess.Popen[bytes]:
    # RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER is Ray's only switch that keeps all of its servers on the loopback address.
    environment = {
        **os.environ,
        **keys,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    return _spawn(
        "ray", ["start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
                f"--dashboard-port={DASHBOARD}", f"--temp-dir={folder}/ray", "--disable-usage-stats"],
        environment,
    )  # fmt: skip


def _spawn(name: str, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with (FOLDER / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [str(BIN / name), *arguments], env=environment, stdout=log, stderr=log, start_new_session=True
        )


def _seed(keys: dict[str, str]) -> None:
    """Copies the demo's photos into the bucket, and writes a job file that scores them."""
    bucket = fsspec.filesystem(
        "s3",
        key=keys["AWS_ACCESS_KEY_ID"],
        secret=keys["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=keys["AWS_ENDPOINT_URL"],
    )
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            bucket.put(f"{PHOTOS}/", "lake/photos/", recursive=True)
            break
        except OSError:  # the store answers before it has made the bucket
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    job = {
        "dataset": {"images": "s3://lake/photos", "layout": "mvtec"},
        "output": {"uri": "s3://lake/inspection"},
        "engine": {"shard_size": 4, "lease_s": 1},
    }
    (FOLDER / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _await_port(name: str, port: int, pid: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not _answers(port):
        if time.monotonic() > deadline or os.waitpid(pid, os.WNOHANG) != (0, 0):
            log = (FOLDER / f"{name}.log").read_text(errors="replace")
            raise StackError(f"{name} did not come up; its last lines:\n{log[-2000:]}")
        time.sleep(0.1)


def _end(pid: int) -> None:
    """SIGTERM to a process, which ends its own children; SIGKILL to its group where that takes too long."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            time.sleep(0.1)
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    try:
        {"up": start, "down": stop}[sys.argv[1]]()
    except StackError as error:
        sys.exit(f"alfa: {error}")
