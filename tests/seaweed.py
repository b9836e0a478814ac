"""A real S3 for tests: SeaweedFS on free ports of the loopback address."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "alfa-test-access", "alfa-test-secret-9b1f"


@dataclass(frozen=True)
class ObjectStorage:
    """A running server and what a client needs to reach it."""

    endpoint: str
    bucket: str
    iceberg: str

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which any S3 client, alfa's too, talks to it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def iceberg_properties(self) -> dict[str, str]:
        """What pyiceberg needs to reach its Iceberg REST catalog, table bucket `tables`."""
        return {
            "type": "rest", "uri": self.iceberg, "warehouse": "tables", "s3.endpoint": self.endpoint,
            "s3.access-key-id": ACCESS_KEY, "s3.secret-access-key": SECRET_KEY, "s3.region": "us-east-1",
            "rest.sigv4-enabled": "true", "rest.signing-name": "s3tables", "rest.signing-region": "us-east-1",
            "client.access-key-id": ACCESS_KEY, "client.secret-access-key": SECRET_KEY, "client.region": "us-east-1",
        }  # fmt: skip

    def iceberg_environment(self, name: str) -> dict[str, str]:
        """The same as variables, under which a new process knows the catalog by a name."""
        return {
            f"PYICEBERG_CATALOG__{name}__{key.replace('.', '__').replace('-', '_')}".upper(): value
            for key, value in self.iceberg_properties.items()
        }


def free_ports(count: int) -> list[int]:
    """Ports that are free now, and whose gRPC twins (10,000 above, SeaweedFS's habit) are free too."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            low, high = (stack.enter_context(contextlib.closing(socket.socket())) for _ in range(2))
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                high.bind(("127.0.0.1", port + 10_000))
                ports.append(port)
        return ports


@contextlib.contextmanager
def run_seaweed(folder: Path) -> Iterator[ObjectStorage]:
    """`weed mini` with a bucket `lake`; it is killed at the end."""
    master, volume, filer, s3, iceberg = free_ports(5)
    command = [
        str(Path(sys.executable).parent / "weed"), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-webdav=false", "-admin.ui=false", "-bucket=lake", "-tableBucket=tables", f"-master.port={master}",
        f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}", f"-s3.port.iceberg={iceberg}",
    ]  # fmt: skip
    secrets = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "S3_BUCKET": "lake"}
    log = folder / "weed.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, env={**os.environ, **secrets}, stdout=output, stderr=output)
    try:
        storage = ObjectStorage(f"http://127.0.0.1:{s3}", "lake", f"http://127.0.0.1:{iceberg}")
        _await_answer(storage.endpoint, server, log)
        yield storage
    finally:
        server.kill()
        server.wait()


def _await_answer(endpoint: str, server: subprocess.Popen[bytes], log: Path, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{endpoint}/lake", timeout=2)
        except urllib.error.HTTPError as error:
            if error.code == 403:  # it asks for a signature, so it is up, and knows the bucket's owner
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"SeaweedFS did not come up: {log.read_text(errors='replace')[-2000:]}")
