"""Tests the fast access to S3 buckets: it gives the same objects as s3fs, and falls back to s3fs."""

from __future__ import annotations

import contextlib
import logging
import stat
import sys
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import pytest

from pipeline.storage import Store, bucket
from schemas.job import Storage
from tests.fault_proxy import FaultProxy
from tests.seaweed import ObjectStorage

NAMES = (
    "a b", "a+b", "a#b", "a?b=c", "a*b", "a~b", "a{b}", "a^b", "a`b", "a[b]", "a<b>", "a\\b", "a|b", 'a"b', "a$b!'()",
    "a@b", "a&b;c,d:e", "%", "%2F", "a%20b", "..a", "a..", "ä", "e\u0301", "日本", "😀", " lead", "trail ", "a\u200bb",
    "a\nb", "a\tb", "a\x7fb", "a\x01b", "a//b",
)  # fmt: skip


def refuse(*_: object, **__: object) -> NoReturn:
    raise AssertionError("s3fs was asked")


@pytest.mark.parametrize("name", NAMES)
def test_an_object_is_the_same_one_by_both_ways(s3: ObjectStorage, name: str) -> None:
    store = Store("s3://lake/names")
    store.write(name, b"new")
    assert store.fs.cat_file(f"lake/names/{name}") == b"new"
    store.fs.pipe_file(f"lake/names/{name}", b"old")
    assert store.read(name) == b"old"


def test_s3fs_is_not_needed_and_browsers_are_told_the_type(s3: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("s3://lake/fast")
    with monkeypatch.context() as patch:
        patch.setattr(store.fs, "cat_file", refuse)
        patch.setattr(store.fs, "pipe_file", refuse)
        store.write("index.html", b"<p>")
        store.write("index.html", b"<h1>")
        assert store.read("index.html") == store.read_uri("s3://lake/fast/index.html") == b"<h1>"
    assert store.fs.info("lake/fast/index.html")["ContentType"] == "text/html; charset=utf-8"


def test_a_name_that_obstore_would_change_is_left_to_s3fs(s3: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("s3://lake")
    store.write("slashed", b"another object")
    monkeypatch.setattr(store.fs, "cat_file", refuse)
    with pytest.raises(AssertionError, match="s3fs was asked"):
        store.read_uri("s3://lake//slashed")


def test_after_a_fault_s3fs_serves_for_a_while_and_longer_each_time(
    s3: ObjectStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Store("s3://lake/resting").write("a", b"data")
    now: list[float] = [1000.0]
    faults: list[bool] = []
    monkeypatch.setattr(bucket.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.WARNING, "pipeline")

    def is_down(method: str, path: str) -> bool:
        return bool(faults) and faults.pop()

    with FaultProxy(s3.endpoint, faults=["reset_before"], share=1.0, applies=is_down) as proxy:
        store = Store("s3://lake/resting", Storage(endpoint_url=proxy.endpoint))

        def is_read_by_s3fs() -> bool:
            with monkeypatch.context() as patch:
                patch.setattr(store.fs, "cat_file", refuse)
                with contextlib.suppress(AssertionError):
                    return store.read("a") != b"data"
            return True

        faults[:] = [True]
        assert store.read("a") == b"data" and proxy.injected.total() == 1
        now[0] += 59.0
        assert is_read_by_s3fs()
        now[0] += 2.0
        faults[:] = [True]
        assert store.read("a") == b"data" and proxy.injected.total() == 2
        now[0] += 119.0
        assert is_read_by_s3fs()
        now[0] += 2.0
        assert not is_read_by_s3fs()
    ends = [said.rpartition("; ")[2] for said in caplog.messages]
    assert ends == ["using s3fs for 60 s, which is slower", "using s3fs for 120 s, which is slower"]


@pytest.mark.parametrize(("lifetime_min", "asked"), [(0, 3), (10, 0)])
def test_credentials_that_end_are_asked_for_anew(
    s3: ObjectStorage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lifetime_min: int, asked: int
) -> None:
    """botocore asks the helper whenever it is asked itself, as what the helper gives ends in less than ten minutes."""
    calls, helper = tmp_path / "calls", tmp_path / "helper"
    keys = {name: s3.environment[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")}
    helper.write_text(
        f"#!{sys.executable}\n"
        "import json, datetime\n"
        f"open({str(calls)!r}, 'a').write('x')\n"
        "end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=5)\n"
        f"print(json.dumps({{'Version': 1, 'AccessKeyId': {keys['ACCESS_KEY_ID']!r},"
        f" 'SecretAccessKey': {keys['SECRET_ACCESS_KEY']!r}, 'Expiration': end.isoformat()}}))\n"
    )
    helper.chmod(helper.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {helper}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setattr(bucket, "_CREDENTIALS_LIVE", timedelta(minutes=lifetime_min))
    store = Store("s3://lake/helper", Storage(region=f"us-east-{lifetime_min}"))  # its own session
    store.fs.connect()
    monkeypatch.setattr(store.fs, "pipe_file", refuse)
    store.write("a", b"1")
    first = len(calls.read_text())
    for _ in range(3):
        store.write("a", b"2")
    assert len(calls.read_text()) - first == asked
