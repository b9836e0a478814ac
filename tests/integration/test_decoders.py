"""Decoders on real Ray: what they decode, and what is left when they die, hang or never start."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.alfa import Detector, PromptEmbeddings
from pipeline.engine import Decoder, DecoderPool
from pipeline.engine.relay import Reply
from pipeline.scoring import Row, View, score_shard
from pipeline.storage import Run, Store
from tests.places import DEMO
from tests.processes import kill_processes
from tests.scoring.runs import comparable_rows, embed, job_for, load_detector, shards_of, write_mixed_photos
from tests.shared_ray import share_ray

OPTIONS = ("model.image_size=98", "model.batch_size=2", "dataset.layout=folders")


class Watched(Store):
    """Knows which files this process has read."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.read: list[str] = []

    def read_uri(self, uri: str) -> bytes:
        self.read.append(Path(uri).name)
        return super().read_uri(uri)


class Shard:
    """The one shard of a folder of photos, and what scores it in this process."""

    def __init__(self, photos: Path, output: Path) -> None:
        self.job = job_for(photos, output, *OPTIONS)
        self.run = Run("run", self.job, "alfa-small", "0" * 64)
        (self.shard,) = shards_of(self.job)
        self.source = Watched(self.job.dataset.images)

    def pool(self, detector: Detector, threads: int, kind: type[Decoder] = Decoder) -> DecoderPool:
        return DecoderPool(self.run, View.of(detector), self.source.uri(""), 1, threads, kind)

    def score(
        self, detector: Detector, prompts: dict[str, PromptEmbeddings], decoders: DecoderPool | None
    ) -> list[Row]:
        """The rows, without what differs between outputs."""
        output = Store(self.job.output.uri)
        score_shard(self.shard, self.run, detector, prompts, self.source, output, threads=2, decoders=decoders)
        return comparable_rows(output, self.run, self.shard)


@pytest.fixture(scope="module")
def detector() -> Detector:
    job = job_for(DEMO, DEMO, *OPTIONS)
    return load_detector(job)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixed_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def prompts(detector: Detector, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PromptEmbeddings]:
    return embed(detector, job_for(photos, tmp_path_factory.mktemp("prompts"), *OPTIONS), "nut")


@pytest.fixture(scope="module")
def alone(
    detector: Detector, photos: Path, prompts: dict[str, PromptEmbeddings], tmp_path_factory: pytest.TempPathFactory
) -> list[Row]:
    """The rows without decoders."""
    rows = Shard(photos, tmp_path_factory.mktemp("alone")).score(detector, prompts, None)
    assert len(rows) == 14 and sum(row["status"] == "ok" for row in rows) == 11
    return rows


def await_decoders(pool: DecoderPool, count: int) -> None:
    before = pool.places
    pool.add(count)
    pool.admit(timeout_s=90)
    assert pool.places == before + count


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_decoders_give_the_same_rows_and_leave_bad_files_to_the_actor(
    detector: Detector, photos: Path, prompts: dict[str, PromptEmbeddings], alone: list[Row], tmp_path: Path
) -> None:
    share_ray()
    shard = Shard(photos, tmp_path)
    pool = shard.pool(detector, threads=0)
    try:
        await_decoders(pool, 2)
        assert shard.score(detector, prompts, pool) == alone
        assert sorted(shard.source.read) == ["03-broken.jpg", "04-empty.jpg", "08-cut.jpg"]
    finally:
        pool.close()


class Fragile(Decoder):
    """Is killed by one photo, and hangs with another, until somebody writes."""

    def decode(self, images: Sequence[Row]) -> Reply:
        for image in images:
            if image["key"].endswith("02.jpg"):
                os.kill(os.getpid(), signal.SIGKILL)
            if image["key"].endswith("06.jpg"):
                os.open(Path(self._arguments[0].job.output.uri) / "never", os.O_RDONLY)
        return super().decode(images)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_photos_that_kill_or_hang_their_decoders_are_decoded_by_the_actor(
    detector: Detector,
    photos: Path,
    prompts: dict[str, PromptEmbeddings],
    alone: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    share_ray()
    monkeypatch.setattr("pipeline.engine.decoders._ANSWER_WITHIN_S", 5)
    os.mkfifo(tmp_path / "never")
    shard = Shard(photos, tmp_path)
    pool = shard.pool(detector, threads=1, kind=Fragile)
    try:
        await_decoders(pool, 2)
        assert shard.score(detector, prompts, pool) == alone
        assert 1 <= pool.places <= 2  # the killer comes to a decoder first
    finally:
        pool.close()
    assert 1 <= len([line for line in caplog.messages if "a decoder failed" in line]) <= 2


class Doomed(DecoderPool):
    """Loses all of its decoders when the model has had two batches."""

    batches = 0

    def note(self, seconds: float, images: int) -> None:
        self.batches += 1
        if self.batches == 2:
            assert kill_processes("ray::Decoder", os.getpid()) == 2


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_killed_decoders_lose_nothing(
    detector: Detector, photos: Path, prompts: dict[str, PromptEmbeddings], alone: list[Row], tmp_path: Path
) -> None:
    share_ray()
    shard = Shard(photos, tmp_path)
    pool = Doomed(shard.run, View.of(detector), shard.source.uri(""), 1, 1)
    try:
        await_decoders(pool, 2)
        assert shard.score(detector, prompts, pool) == alone
        assert pool.batches == 7
    finally:
        pool.close()


@pytest.fixture
def gpu_node() -> Iterator[Cluster]:
    """A cluster of one node, which has a GPU and two cores; this process has joined it."""
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1, "include_dashboard": False})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_decoders_wait_for_a_node_without_a_gpu_and_nobody_waits_for_them(
    detector: Detector,
    photos: Path,
    prompts: dict[str, PromptEmbeddings],
    alone: list[Row],
    tmp_path: Path,
    gpu_node: Cluster,
) -> None:
    shard = Shard(photos, tmp_path)
    pool = shard.pool(detector, threads=1)
    try:
        pool.add(1)
        pool.admit(timeout_s=5)
        assert pool.places == 1
        assert shard.score(detector, prompts, pool) == alone
        gpu_node.add_node(num_cpus=1)
        pool.admit(timeout_s=90)
        assert pool.places == 2
    finally:
        pool.close()
