"""Tests that nothing listens on the network, reveals a secret, or is written outside the output."""

from __future__ import annotations

import io
import re
import shutil
import socket
import struct
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipeline.engine import connect
from pipeline.storage import Store
from schemas.job import parse_job
from tests.command import alfa, alfa_alone
from tests.llm_server import LLMServer, Reply
from tests.places import DEMO
from tests.seaweed import SECRET_KEY, ObjectStorage
from tests.shared_ray import share_ray

LLM_KEY, HUB_TOKEN, OTHER_SECRET = "sk-planted-0b5e7c", "hf_planted_71aa90", "planted/secret+42ce"


def listening_addresses(mark: str) -> set[str]:
    """Addresses on which the processes that carry `mark` in their environment accept TCP connections."""
    sockets: dict[str, str] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                words = [struct.pack("=I", int(fields[1][at : at + 8], 16)) for at in range(0, len(fields[1]) - 5, 8)]
                address = socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, b"".join(words))
                sockets[fields[9]] = address.removeprefix("::ffff:")
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                links = [str(descriptor.readlink()) for descriptor in (process / "fd").iterdir()]
                inodes = [match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))]
                found |= {sockets[inode] for inode in inodes if inode in sockets}
        except OSError:  # it has ended since
            continue
    return found


def test_a_local_ray_listens_on_the_loopback_address_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    mark = uuid.uuid4().hex
    monkeypatch.setenv("ALFA_TEST_MARK", mark)
    with connect(parse_job({"dataset": {"images": "x"}, "output": {"uri": str(tmp_path)}})):
        assert ray.get(ray.remote(lambda: 1).remote()) == 1
        assert listening_addresses(mark) == {"127.0.0.1"}


SECRETS = [SECRET_KEY, LLM_KEY, HUB_TOKEN, OTHER_SECRET]


def quote_the_key(status: int) -> Reply:
    """What careless providers do: an error that repeats the key it was given."""
    return (
        status,
        {"Retry-After": "0"},
        f'{{"error": {{"message": "bad request with Authorization: Bearer {LLM_KEY}"}}}}',
    )


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray keeps its logs; a short path, for sockets lie there too."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def find_secrets(texts: dict[str, bytes]) -> list[tuple[str, str]]:
    return [(place, secret) for place, text in texts.items() for secret in SECRETS if secret.encode() in text]


@pytest.mark.slow
def test_no_secret_is_told_anywhere(s3: ObjectStorage, ray_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A night whose LLM refuses with the key in its words, one that succeeds, and one with credentials in its URIs."""
    planted = {"OPENAI_API_KEY": LLM_KEY, "HF_TOKEN": HUB_TOKEN, "FACTORY_DB_PASSWORD": OTHER_SECRET}
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    photos, told = Store("s3://lake/secret-photos"), {}
    for number in range(2):
        data = (DEMO / f"hazelnut/test/good/0{number}.jpg").read_bytes()
        photos.write(f"hazelnut/{number}.jpg", data)
    photos.write("hazelnut/broken.jpg", b"broken")
    night = ("score", "--images", photos.uri(""), "--output", "s3://lake/secret", "--llm", "openai/test")
    with LLMServer([quote_the_key(500), quote_the_key(401)]) as server:
        sets = ("--set", f"prompts.api_base={server.api_base}", "--set", "engine.max_error_rate=1")
        refused, done = alfa_alone(*night, *sets), alfa_alone(*night, *sets)
    credentials = f"s3://key:{OTHER_SECRET.replace('/', '%2F')}@lake/x"
    mistaken = alfa_alone("score", "--images", credentials, "--output", f"s3://user:{HUB_TOKEN}@lake/y")
    for name, run, code in (("refused", refused, 1), ("done", done, 0), ("mistaken", mistaken, 2)):
        assert run.returncode == code, run.stderr
        told |= {f"{name} stdout": run.stdout.encode(), f"{name} stderr": run.stderr.encode()}
    assert "refuses the API key" in refused.stderr and "must not hold credentials" in mistaken.stderr
    assert "42ce" not in mistaken.stderr
    lake = Store("s3://lake/secret")
    for info in lake.list():
        data = lake.read(info.key)
        told[info.key] = data
        if info.key.endswith(".parquet"):  # compressed, so read as text
            table = pq.read_table(io.BytesIO(data))
            told[f"{info.key} as text"] = f"{table.schema} {table.to_pylist()}".encode()
    logs = {str(path): path.read_bytes() for path in ray_folder.rglob("*") if path.is_file() and not path.is_symlink()}
    assert len(logs) > 20 and any("stats.json" in place for place in told)
    assert find_secrets(told | logs) == []


HOSTILE_CLASSES = ["..", ".", "/etc", "a/b", "a\nb", "%2e%2e", "漢字 ü", "x" * 400, "<script>alert(1)</script>", "con"]
HOSTILE_KEYS = [
    "a.png", "a.png.png", "A.png", "%2e%2e/a.png", "%61.png", "..%2fa.png", "line\nbreak.png", "tab\there.png",
    "漢字/ü.png",
    "-rf.png", "a b.png", " .png", "~.png", "$(id).png", "back\\slash.png", '"quote".png', "[red]markup[/red].png",
    "d.png/e.png", "/".join(["deep" * 20] * 12) + "/f.png", "/".join(["deep" * 20] * 12) + "/g.png", "n" * 240 + ".png",
]  # fmt: skip


@pytest.mark.slow
def test_hostile_names_stay_in_the_output_and_share_no_mask(tmp_path: Path) -> None:
    """Every key in every kind of reference: below the table's folder, above it, and absolute."""
    photo = (DEMO / "hazelnut/test/good/00.jpg").read_bytes()
    inside, outside, output = tmp_path / "t", tmp_path / "elsewhere", tmp_path / "deep" / "out"
    uris = []
    for folder in (inside, outside):
        for key in HOSTILE_KEYS:
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo)
        uris += [str(folder / key) if folder is inside else f"../elsewhere/{key}" for key in HOSTILE_KEYS]
    uris += ["/etc/passwd", "../../../../../../../../etc/passwd-not", "file:///etc/hostname", "x/\0y.png"]
    rows = [{"uri": uri, "class_name": HOSTILE_CLASSES[at % len(HOSTILE_CLASSES)]} for at, uri in enumerate(uris)]
    rows += [{"uri": f"{at}.jpg", "class_name": name} for at, name in enumerate(HOSTILE_CLASSES)]
    pq.write_table(pa.Table.from_pylist(rows), inside / "table.parquet")
    before = {path for path in tmp_path.rglob("*")}
    share_ray()
    done = alfa("score", "--images", inside / "table.parquet", "--output", output, "--set", "engine.max_error_rate=1")
    assert done.returncode == 0, done.stderr
    new = {path for path in tmp_path.rglob("*")} - before - set(output.parents) - {output}
    assert all(path.resolve().is_relative_to(output) for path in new)
    tables = [pq.read_table(path, partitioning=None) for path in output.glob("scores/**/*.parquet")]
    published = [row for table in tables for row in table.to_pylist()]
    assert len(published) == len({row["image_uri"] for row in published}) == len(rows)
    masks = [row["mask_uri"] for row in published if row["status"] == "ok"]
    assert len(set(masks)) == len(masks) == 2 * len(HOSTILE_KEYS)
    for mask in masks:
        assert Path(mask).is_file() and Path(mask).resolve().is_relative_to(output / "masks")
    assert {row["error_type"] for row in published if row["status"] == "error"} <= {
        "vanished",
        "not_an_image",
        "unreadable",
    }
