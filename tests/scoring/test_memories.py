"""Tests the peers of a run: which photos are chosen, that their memory is made once, and that scores depend on nothing
else."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.alfa import Detector, PromptEmbeddings, load_encoder, locate_weights
from pipeline.images import list_images, open_dataset
from pipeline.scoring import (
    CANDIDATES_PER_PEER,
    LowestIds,
    Neighbours,
    PreparedClasses,
    prepare_class,
    score_shard,
)
from pipeline.scoring.memories import read_memory
from pipeline.storage import Run, Store, read_shard
from schemas.job import JobConfig
from schemas.tables import MANIFEST
from tests.places import DEMO
from tests.scoring.runs import cut_batches, embed, job_for

PHOTOS = sorted((DEMO / "hazelnut" / "test").rglob("*.jpg"))
SMALL = ("peers.images=6", "peers.min_images=4", "model.batch_size=4")


@pytest.fixture(scope="module")
def detector() -> Detector:
    job = job_for(DEMO, DEMO, *SMALL)
    encoder = load_encoder(job.model, locate_weights(job.model))
    return Detector(encoder, job.resolved_method, job.references, job.peers)


@pytest.fixture(scope="module")
def prompts(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> PromptEmbeddings:
    return embed(detector, job_for(DEMO, tmp_path_factory.mktemp("prompts")), "hazelnut")["hazelnut"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "in" / "hazelnut"
    folder.mkdir(parents=True)
    for photo in PHOTOS[:9]:
        shutil.copy(photo, folder / f"{photo.parent.name}-{photo.name}")
    return tmp_path / "in"


def night(job: JobConfig) -> tuple[list[pa.RecordBatch], Neighbours]:
    assert job.peers is not None
    choice = LowestIds(CANDIDATES_PER_PEER * job.peers.images)
    batches = list(choice.watch(list_images(open_dataset(job.dataset, job.storage))))
    return batches, Neighbours(peers=choice.rows["hazelnut"])


def score(
    detector: Detector, prompts: PromptEmbeddings, job: JobConfig, neighbours: Neighbours, size: int = 256
) -> dict[str, dict[str, Any]]:
    """The rows of all images by their key, scored in shards of `size` by a process that has prepared nothing yet."""
    run, output, source = Run("run", job, "alfa-small", "0" * 64), Store(job.output.uri), Store(job.dataset.images)
    classes = PreparedClasses(lambda _: prepare_class(run, prompts, neighbours, detector, source, output, "me"))
    rows: list[dict[str, Any]] = []
    for shard in cut_batches(list_images(open_dataset(job.dataset, job.storage)), size):
        score_shard(shard, run, detector, classes, source, output, threads=2)
        rows += read_shard(output, run.shards, shard.shard_id).to_pylist()
    return {row["image_key"]: row for row in rows}


def manifest_of(ids: Sequence[str], name: str = "nut") -> pa.RecordBatch:
    rows = [
        {"uri": f"{name}/{number}", "key": number, "class_name": name, "image_id": number, "size": 1, "etag": None}
        for number in ids
    ]
    return pa.RecordBatch.from_pylist(rows, schema=MANIFEST)


def test_candidates_are_the_lowest_ids_of_each_class_in_any_order() -> None:
    ids = [f"{number * 7919 % 1000:032x}" for number in range(1000)]
    for order in (ids, ids[::-1]):
        choice = LowestIds(12)
        batches = [manifest_of(order[start : start + 90]) for start in range(0, 1000, 90)]
        passed = list(choice.watch([*batches, manifest_of(["b", "a"], "pill")]))
        assert passed == [*batches, manifest_of(["b", "a"], "pill")]
        found = {name: [row["image_id"] for row in rows] for name, rows in choice.rows.items()}
        assert found == {"nut": [f"{number:032x}" for number in range(12)], "pill": ["a", "b"]}


def test_shard_size_order_and_late_images_move_no_score(
    detector: Detector, prompts: PromptEmbeddings, images: Path, tmp_path: Path
) -> None:
    """Another driver, whose manifest has late images, goes on with the run: the stored peers count."""
    job = job_for(images, tmp_path / "out", *SMALL)
    first = score(detector, prompts, job, night(job)[1])
    assert {row["peers"] for row in first.values()} == {6} and len(first) == 9
    for row in first.values():
        assert row["image_uri"] not in [region["peer_uri"] for region in row["regions"] or []]
        assert len(row["peer_uris"]) == 6 and len(row["peer_grid"]) == len(row["grid"])
    late = images / "hazelnut"
    for photo in PHOTOS[9:]:
        shutil.copy(photo, late / f"{photo.parent.name}-{photo.name}")
    _, neighbours = night(job)
    again = score(detector, prompts, job, replace(neighbours, peers=neighbours.peers[::-1]), size=1)
    assert len(again) == len(PHOTOS)
    for key, row in first.items():
        assert again[key]["score"] == pytest.approx(row["score"], abs=1e-5)
        np.testing.assert_allclose(again[key]["grid"], row["grid"], atol=1e-5)


def test_peers_that_cannot_be_read_or_are_copies_are_replaced_by_the_next(
    detector: Detector, prompts: PromptEmbeddings, images: Path, tmp_path: Path
) -> None:
    job = job_for(images, tmp_path / "out", *SMALL)
    _, neighbours = night(job)
    first, second, third = (Path(row["uri"]) for row in neighbours.peers[:3])
    first.write_bytes(b"no photo")
    shutil.copy(second, third)
    rows = score(detector, prompts, job, neighbours)
    uris = next(row["peer_uris"] for row in rows.values() if row["status"] == "ok")
    assert uris == [row["uri"] for row in (neighbours.peers[1], *neighbours.peers[3:8])]
    assert sorted(row["status"] for row in rows.values()).count("error") == 1


def test_a_class_with_too_few_readable_images_stays_with_language(
    detector: Detector, prompts: PromptEmbeddings, images: Path, tmp_path: Path
) -> None:
    job = job_for(images, tmp_path / "out", "peers.images=9", "peers.min_images=9", "model.batch_size=4")
    _, neighbours = night(job)
    Path(neighbours.peers[0]["uri"]).write_bytes(b"no photo")
    rows = [row for row in score(detector, prompts, job, neighbours).values() if row["status"] == "ok"]
    assert {(row["peers"], row["score_peers"], row["peer_uris"]) for row in rows} == {(0, None, None)}
    alone = score(detector, prompts, job_for(images, tmp_path / "alone", "peers=none"), Neighbours())
    assert all(alone[row["image_key"]]["score"] == pytest.approx(row["score"], abs=1e-5) for row in rows)


def test_unchanged_photos_of_earlier_nights_fill_up_and_are_counted(
    detector: Detector, prompts: PromptEmbeddings, images: Path, tmp_path: Path
) -> None:
    """Earlier nights may lie in other folders than tonight's, as in buckets that are laid out by date."""
    shutil.copytree(images, tmp_path / "earlier")
    _, before = night(job_for(tmp_path / "earlier", tmp_path / "before"))
    job = job_for(images, tmp_path / "out", *SMALL)
    _, found = night(job)
    taken = {Path(row["uri"]).name for row in found.peers[:2]}
    changed, *others = [row for row in before.peers if Path(row["uri"]).name not in taken]
    neighbours = Neighbours(peers=found.peers[:2], earlier=[{**changed, "etag": "another"}, *others])
    rows = score(detector, prompts, job, neighbours)
    assert {(row["peers"], row["peers_earlier"]) for row in rows.values()} == {(6, 4)}
    assert next(iter(rows.values()))["peer_uris"] == [row["uri"] for row in (*found.peers[:2], *others[:4])]
    assert not Path(others[0]["uri"]).is_relative_to(images)


def test_one_of_many_makes_the_memory_and_all_score_against_it(
    detector: Detector, prompts: PromptEmbeddings, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_for(images, tmp_path / "out", *SMALL)
    _, neighbours = night(job)
    run, output, source = Run("run", job, "alfa-small", "0" * 64), Store(job.output.uri), Store(str(images))
    made: list[str] = []
    monkeypatch.setattr(output, "create", record(output.create, made))

    def prepare(owner: int) -> PromptEmbeddings:
        return prepare_class(run, prompts, neighbours, detector, source, output, f"owner {owner}")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(prepare, range(4)))
    assert sum(key.endswith(".safetensors") for key in made) == 1
    stored = read_memory("run", "hazelnut", output)
    assert stored is not None and stored.peers is not None
    assert {item.peers and item.peers.calibration for item in found} == {stored.peers.calibration}


def record(create: Any, keys: list[str]) -> Any:
    def recorded(key: str, data: Any) -> bool:
        keys.append(key)
        return bool(create(key, data))

    return recorded
