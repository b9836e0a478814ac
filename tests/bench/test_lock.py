"""Tests the lock's measurement against work whose share of the lock is known."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable

import pytest

from tests.bench.lock import LockSampler


def count() -> None:
    for _ in range(6_000_000):
        pass


def compress() -> None:
    zlib.compress(bytes(50_000_000), 1)


def wait() -> None:
    time.sleep(0.2)


def test_pure_python_holds_the_lock_for_all_of_its_core_time(sampler: LockSampler) -> None:
    cost = sampler.measure(count)
    assert cost.lock == pytest.approx(cost.core, rel=0.3)


@pytest.mark.parametrize("run", [compress, wait])
def test_work_that_gives_the_lock_up_does_not_count(sampler: LockSampler, run: Callable[[], None]) -> None:
    assert sampler.measure(run).lock < 0.02
