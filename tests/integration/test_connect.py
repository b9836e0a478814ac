"""Tests which Ray a job uses: its own, or the one that it names, but never another that runs or ran on this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipeline.engine import EngineError, connect
from schemas.job import JobConfig, parse_job
from tests.command import alfa_alone
from tests.places import DEMO
from tests.ray_head import Head, run_head

CPUS = 7
"""Of the other Ray; no machine of tests has as many by chance in a Ray of alfa's own."""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with run_head(CPUS) as head:
        yield head


@pytest.fixture(autouse=True)
def apart() -> None:
    """No Ray that other tests share."""
    ray.shutdown()


def job(*overrides: str) -> JobConfig:
    return parse_job({"dataset": {"images": "x"}, "output": {"uri": "y"}}, overrides)


def port_of(address: str) -> str:
    return address.rpartition(":")[2]


def cpus_of_own_ray() -> int:
    with connect(job()):
        assert ray.get(ray.remote(lambda: "works").remote()) == "works"
        return int(ray.cluster_resources()["CPU"])


@pytest.mark.slow
def test_a_job_joins_the_cluster_that_it_names(head: Head, tmp_path: Path) -> None:
    # The head listens on the loopback address alone; this is Ray's switch for clients of such a head.
    environment = {**head.environment, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    arguments = ("check", "--images", DEMO, "--output", tmp_path)
    checked = alfa_alone(*arguments, RAY_ADDRESS=head.gcs, **environment)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"1 on CPU, {CPUS} cores each" in checked.stdout


@pytest.mark.slow
def test_a_ray_that_runs_or_ran_on_this_machine_is_left_alone(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(head.folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert port_of(head.joined_by_default()) == port_of(head.gcs)
    assert cpus_of_own_ray() != CPUS
    head.kill()
    assert port_of(head.joined_by_default()) == port_of(head.gcs)
    assert cpus_of_own_ray() != CPUS


def refusal(address: str, timeout_s: float = 60.0) -> str:
    with pytest.raises(EngineError) as raised, connect(job(f"engine.address={address}"), timeout_s):
        pass
    assert not ray.is_initialized()
    return str(raised.value)


def test_a_head_that_does_not_answer_is_one_clear_line_when_time_is_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        assert refusal(address, 3.0) == (
            f"the Ray cluster at {address} cannot be joined: no answer for 3 s; check that its head runs, and that "
            f"engine.address or RAY_ADDRESS is right"
        )


@pytest.mark.parametrize(("address", "reason"), [("http://head:8265", "HTTP address"), ("nowhere", "Invalid address")])
def test_an_address_that_is_none_is_one_clear_line(address: str, reason: str) -> None:
    said = refusal(address)
    assert f"the Ray cluster at {address} cannot be joined" in said
    assert reason in said
    assert len(said.splitlines()) == 1
