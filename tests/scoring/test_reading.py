"""Shards whose photos are decoded in part by others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.alfa import Detector, PromptEmbeddings
from pipeline.images import Decoded, ImageError
from pipeline.scoring import Decoders, PhotoReader, Row, Shard, ShardStats, View, score_shard
from pipeline.storage import Run, Store, StoreError
from schemas.job import JobConfig
from schemas.tables import MANIFEST
from tests.places import DEMO
from tests.scoring.runs import comparable_rows, embed, job_for, load_detector, shards_of, write_mixed_photos

OPTIONS = ("model.image_size=98", "model.batch_size=4", "dataset.layout=folders")


class Shared:
    """Decodes every second chunk itself, as another process would, and leaves the rest to the caller."""

    places = 3

    def __init__(self, reader: PhotoReader) -> None:
        self._reader = reader
        self.order = threading.Lock()
        self._lock = threading.Lock()
        self.chunks: list[int] = []
        self.noted: list[tuple[float, int]] = []

    def decode(
        self, images: Sequence[Row], here: Callable[[Row], Decoded | ImageError]
    ) -> Sequence[Decoded | ImageError]:
        with self._lock:
            self.chunks.append(len(images))
            mine = len(self.chunks) % 2
        return [(self._reader.read if mine else here)(image) for image in images]

    def note(self, seconds: float, images: int) -> None:
        self.noted.append((seconds, images))


class Unusable(Shared):
    """Another process whose store is out of order."""

    def decode(self, images: Sequence[Row], here: object) -> Sequence[Decoded | ImageError]:
        raise StoreError("the store is away")


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


def make_reader(detector: Detector, job: JobConfig, run: Run) -> PhotoReader:
    return PhotoReader(run, View.of(detector), Store(job.dataset.images), Store(job.output.uri))


def rows_of(
    detector: Detector,
    job: JobConfig,
    run: Run,
    shard: Shard,
    prompts: dict[str, PromptEmbeddings],
    decoders: Decoders | None,
) -> tuple[ShardStats, list[Row]]:
    """Stats and rows, without what differs between two outputs."""
    output = Store(job.output.uri)
    stats = score_shard(shard, run, detector, prompts, Store(job.dataset.images), output, threads=2, decoders=decoders)
    return stats, comparable_rows(output, run, shard)


@pytest.mark.parametrize("tile", [(), ("method.tile.size=400",)], ids=["whole", "tiles"])
def test_rows_do_not_depend_on_who_decodes(
    tile: tuple[str, ...], detector: Detector, photos: Path, prompts: dict[str, PromptEmbeddings], tmp_path: Path
) -> None:
    found, shared = [], None
    for name in ("alone", "shared"):
        job = job_for(photos, tmp_path / name, *OPTIONS, *tile)
        run = Run("run", job, "alfa-small", "0" * 64)
        shared = Shared(make_reader(detector, job, run)) if name == "shared" else None
        (shard,) = shards_of(job)
        found.append(rows_of(detector, job, run, shard, prompts, shared))
    assert found[0] == found[1]
    stats, rows = found[0]
    assert (stats.images, sum(stats.errors.values())) == (14, 3)
    assert [Path(row["image_key"]).name for row in rows] == sorted(path.name for path in photos.glob("*/*"))
    assert shared is not None
    assert shared.chunks == ([1] * 14 if tile else [4, 4, 4, 2])
    assert [images for _, images in shared.noted] == shared.chunks


def test_a_shard_without_images_asks_nobody(
    detector: Detector, photos: Path, prompts: dict[str, PromptEmbeddings], tmp_path: Path
) -> None:
    job = job_for(photos, tmp_path, *OPTIONS)
    run = Run("run", job, "alfa-small", "0" * 64)
    shared = Shared(make_reader(detector, job, run))
    empty = Shard("0" * 16, MANIFEST.empty_table())
    stats, rows = rows_of(detector, job, run, empty, prompts, shared)
    assert (stats.images, rows, shared.chunks, shared.noted) == (0, [], [], [])


def test_an_outage_ends_the_shard(
    detector: Detector, photos: Path, prompts: dict[str, PromptEmbeddings], tmp_path: Path
) -> None:
    job = job_for(photos, tmp_path, *OPTIONS)
    run = Run("run", job, "alfa-small", "0" * 64)
    (shard,) = shards_of(job)
    with pytest.raises(StoreError, match="the store is away"):
        rows_of(detector, job, run, shard, prompts, Unusable(make_reader(detector, job, run)))
    assert not list(Store(job.output.uri).list("runs"))
