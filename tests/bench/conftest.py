from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bench.lock import LockSampler, sample_lock


@pytest.fixture(scope="session")
def sampler() -> Iterator[LockSampler]:
    with sample_lock() as started:
        yield started
