from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.seaweed import ObjectStorage, run_seaweed


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStorage]:
    with run_seaweed(tmp_path_factory.mktemp("seaweed")) as storage:
        yield storage


@pytest.fixture
def s3(seaweed: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> ObjectStorage:
    """A running S3 that every client of this test, and of the processes that it starts, talks to."""
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    return seaweed
