"""Tests failing object storage: a proxy between alfa and SeaweedFS makes a share of the requests fail."""

from __future__ import annotations

import io
from collections import Counter
from itertools import count

import pyarrow.parquet as pq
import pytest

from pipeline.storage import Store, StoreError
from schemas.job import Storage
from tests.command import alfa_alone
from tests.fault_proxy import FAULTS, FaultProxy
from tests.nights import NIGHT
from tests.places import DEMO
from tests.seaweed import ObjectStorage


def test_every_fault_is_survived_by_every_operation(s3: ObjectStorage) -> None:
    plain = Store("s3://lake/faults")
    with FaultProxy(s3.endpoint, faults=[name for name in FAULTS if name != "stall"], share=0.25) as proxy:
        store = Store("s3://lake/faults", Storage(endpoint_url=proxy.endpoint))
        for number in range(40):
            key, data = f"k/{number:02}", b"%d" % number * 1000
            store.write(key, data)
            assert store.read(key) == data and store.exists(key) and store.info(key).size == len(data)
            assert store.create(f"c/{number}", b"mine %d" % number)
            assert not store.create(f"c/{number}", b"another's %d" % number)
            assert plain.read(f"c/{number}") == b"mine %d" % number
        assert [info.key for info in store.list("k")] == [f"k/{number:02}" for number in range(40)]
        for number in range(40):
            store.delete(f"k/{number:02}")
        assert list(plain.list("k")) == []
        assert all(proxy.injected[name] > 5 for name in FAULTS if name != "stall")


@pytest.mark.slow
def test_a_night_behind_a_faulty_network_has_all_rows_ok(s3: ObjectStorage) -> None:
    photos, lake = Store("s3://lake/faulty-photos"), Store("s3://lake/faulty")
    for path in sorted(DEMO.glob("*/test/*/*.jpg")):
        photos.write(f"{path.parts[-4]}/{path.parts[-2]}-{path.name}", path.read_bytes())
    with FaultProxy(s3.endpoint) as proxy:
        done = alfa_alone(
            "score", "--images", photos.uri(""), "--output", lake.uri(""), "--run-date", NIGHT,
            "--set", "engine.shard_size=4", AWS_ENDPOINT_URL=proxy.endpoint,
        )  # fmt: skip
        injected, requests = proxy.injected, proxy.requests
    assert done.returncode == 0, done.stderr
    assert injected.total() > 0.05 * requests and set(injected) == set(FAULTS)
    rows = [row for info in lake.list("scores") for row in pq.read_table(io.BytesIO(lake.read(info.key))).to_pylist()]
    assert Counter(row["status"] for row in rows) == {"ok": 24}
    assert len({row["image_id"] for row in rows}) == 24
    assert all(lake.read_uri(row["mask_uri"]) for row in rows)


@pytest.mark.slow
def test_credentials_that_expire_in_the_night_are_one_clear_line(s3: ObjectStorage) -> None:
    photos = Store("s3://lake/expiring-photos")
    for path in sorted(DEMO.glob("hazelnut/test/*/*.jpg")):
        photos.write(f"hazelnut/{path.parts[-2]}-{path.name}", path.read_bytes())
    arguments = ("score", "--images", photos.uri(""), "--output", "s3://lake/expiring", "--run-date", NIGHT)

    read = count()

    def is_after_six_photos(method: str, path: str) -> bool:
        return method == "GET" and ".jpg" in path and next(read) >= 6

    with FaultProxy(s3.endpoint, faults=["expired"], share=1.0, applies=is_after_six_photos) as proxy:
        stopped = alfa_alone(*arguments, "--set", "engine.shard_size=4", AWS_ENDPOINT_URL=proxy.endpoint)
        assert proxy.injected["expired"] > 0
    assert stopped.returncode == 1
    assert "check the credentials in the environment, and that they have not expired" in stopped.stderr
    assert "Traceback" not in stopped.stderr and len(stopped.stderr.strip().splitlines()) < 15
    assert list(Store("s3://lake/expiring").list("scores")) == []
    again = alfa_alone(*arguments, "--set", "engine.shard_size=4")
    assert again.returncode == 0 and "12, 12 ok" in again.stdout


@pytest.mark.parametrize("operation", ["read", "info", "write", "list"])
def test_wrong_credentials_are_a_store_error_whatever_is_asked(
    s3: ObjectStorage, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-5d21")
    store = Store("s3://lake/denied", Storage(region="us-east-2"))
    calls = {
        "read": lambda: store.read("a"),
        "info": lambda: store.info("a"),
        "write": lambda: store.write("a", b""),
        "list": lambda: list(store.list()),
    }
    with pytest.raises(StoreError, match="credentials") as caught:
        calls[operation]()
    assert "wrong-secret" not in str(caught.value)


def test_a_store_that_is_down_is_a_store_error_and_no_row() -> None:
    store = Store("s3://lake/x", Storage(endpoint_url="http://127.0.0.1:9", anonymous=True))
    with pytest.raises(StoreError, match="does not answer"):
        store.probe()
