"""Tests the choice of reference images, and what the lake keeps of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.planning import open_source, plan_run
from pipeline.alfa import Detector, load_encoder, locate_weights
from pipeline.images import DatasetError, list_references, open_dataset
from pipeline.scoring import (
    Neighbours,
    Spans,
    ThresholdError,
    choose_references,
    describe_choice,
    image_decoder,
    make_memory,
    prepare_class,
    reference_thresholds,
    score_shard,
)
from pipeline.scoring.memories import read_memory
from pipeline.storage import Run, Store, paths, read_shard
from schemas.job import JobConfig, JobError, parse_job
from tests.places import DEMO
from tests.scoring.runs import embed, shards_of

GOOD = DEMO / "hazelnut" / "test" / "good"


def job_for(images: Path, output: Path, *overrides: str) -> JobConfig:
    document = {"dataset": {"images": str(images)}, "output": {"uri": str(output)}, "run_date": "2026-01-02"}
    return parse_job(document, ["references.images=train", "references.shots=2", *overrides])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MVTec's layout: three train images of hazelnuts; a pill that has none."""
    root = tmp_path_factory.mktemp("data")
    photos = sorted(GOOD.iterdir())
    for part, chosen in (("train/good", photos[:3]), ("test/good", photos[3:5])):
        (root / "hazelnut" / part).mkdir(parents=True)
        for photo in chosen:
            shutil.copy(photo, root / "hazelnut" / part)
    (root / "hazelnut/test/colour").mkdir()
    shutil.copy(next((DEMO / "hazelnut/test/colour").iterdir()), root / "hazelnut/test/colour")
    (root / "pill/test/good").mkdir(parents=True)
    shutil.copy(photos[5], root / "pill/test/good")
    return root


@pytest.fixture(scope="module")
def detector(dataset: Path) -> Detector:
    job = job_for(dataset, dataset)
    return Detector(load_encoder(job.model, locate_weights(job.model)), job.resolved_method, job.references)


def references_of(job: JobConfig) -> list[dict[str, Any]]:
    assert job.references is not None
    return list_references(job.references, job.dataset, open_dataset(job.dataset, job.storage), job.storage)


def test_train_is_the_good_train_images_of_the_layout(dataset: Path, tmp_path: Path) -> None:
    rows = references_of(job_for(dataset, tmp_path))
    assert [row["key"] for row in rows] == [f"hazelnut/train/good/{path.name}" for path in sorted(GOOD.iterdir())[:3]]
    with pytest.raises(DatasetError, match="layout folders has no train images"):
        references_of(job_for(GOOD.parent, tmp_path))


def test_train_is_the_normal_train_split_of_visa(tmp_path: Path) -> None:
    (tmp_path / "split_csv").mkdir()
    lines = ["object,split,label,image,mask", "pcb,train,normal,pcb/a.JPG,", "pcb,test,normal,pcb/b.JPG,"]
    (tmp_path / "split_csv/1cls.csv").write_text("\n".join(lines))
    assert [row["key"] for row in references_of(job_for(tmp_path, tmp_path))] == ["pcb/a.JPG"]


def test_a_folder_elsewhere_is_read_a_class_a_folder(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(GOOD, tmp_path / "known" / "hazelnut")
    rows = references_of(job_for(dataset, tmp_path, f"references.images={tmp_path / 'known'}"))
    assert {row["class_name"] for row in rows} == {"hazelnut"} and len(rows) == len(list(GOOD.iterdir()))


def image_row(class_name: str, key: str) -> dict[str, Any]:
    return {"class_name": class_name, "key": key}


def test_the_choice_is_steady_and_grows_with_the_shots() -> None:
    rows = [image_row(name, f"{number}.png") for name in ("nut", "pill") for number in range(20)]
    first = choose_references(rows, 4, seed=0)
    assert first == choose_references(list(reversed(rows)), 4, seed=0)
    assert choose_references(rows, 2, seed=0)["nut"] == first["nut"][:2]
    assert choose_references(rows, 4, seed=1) != first
    assert [row["key"] for row in first["nut"]] != [row["key"] for row in first["pill"]]
    bolt = image_row("bolt", "0.png")
    assert choose_references([*rows, bolt], 4, seed=0) == {**first, "bolt": [bolt]}


def test_classes_with_too_few_references_are_named() -> None:
    chosen = choose_references([image_row("nut", "a"), image_row("nut", "b")], 4, seed=0)
    lines = describe_choice(chosen, ["nut", "pill"], 4)
    assert lines == [
        "class nut has 2 reference images, not 4; all of them are used",
        "class pill has no reference images; it is scored zero-shot",
    ]


def test_other_references_are_another_run(dataset: Path, tmp_path: Path) -> None:
    root = tmp_path / "in"
    shutil.copytree(dataset, root)

    def run_id(*overrides: str) -> str:
        job = job_for(root, tmp_path / "out", *overrides)
        output = Store(job.output.uri)
        return plan_run(job, open_source(job, output), tmp_path, output).run.run_id

    before = run_id()
    assert before == run_id() and len({before, run_id("references.seed=3"), run_id("references.shots=1")}) == 3
    for photo in (root / "hazelnut/train/good").iterdir():
        shutil.copy(next((DEMO / "hazelnut/test/colour").iterdir()), photo)
    assert run_id() != before


def test_rows_say_what_they_were_compared_with_and_the_memory_is_kept(
    detector: Detector, dataset: Path, tmp_path: Path
) -> None:
    job = job_for(dataset, tmp_path, "references.shots=3")
    (dataset / "hazelnut/train/good/broken.jpg").write_bytes(b"\xff\xd8 broken")
    run, output, source = Run("run", job, "alfa-small", "0" * 64), Store(job.output.uri), Store(str(dataset))
    prompts = embed(detector, job, "hazelnut", "pill")
    rows = references_of(job)
    (dataset / "hazelnut/train/good/broken.jpg").unlink()
    assert len(rows) == 4
    neighbours = Neighbours(rows)
    prompts["hazelnut"] = prepare_class(run, prompts["hazelnut"], neighbours, detector, source, output, "me")
    for shard in shards_of(job):
        score_shard(shard, run, detector, prompts, source, output, threads=2)
        table = read_shard(output, run.shards, shard.shard_id).to_pylist()
    assert {(row["class_name"], row["shots"]) for row in table} == {("hazelnut", 3), ("pill", 0)}
    for row in table:
        assert (row["score_reference"] is None) == (row["class_name"] == "pill")
        assert row["map_peak"] == pytest.approx(max(row["grid"])) and row["threshold_source"] == "fixed"
    stored = output.read(paths.memory_key("run", "hazelnut"))
    again = prepare_class(
        run, embed(detector, job, "hazelnut")["hazelnut"], neighbours, detector, source, output, "you"
    )
    assert again.memory is not None and prompts["hazelnut"].memory is not None
    assert torch.equal(again.memory.tokens, prompts["hazelnut"].memory.tokens)
    assert output.read(paths.memory_key("run", "hazelnut")) == stored


def test_leave_one_out_thresholds(detector: Detector, dataset: Path, tmp_path: Path) -> None:
    """Each reference, scored by a memory that is built of the others alone."""
    job = job_for(dataset, tmp_path)
    output = Store(job.output.uri)
    prompts, decode, rows = (
        embed(detector, job, "hazelnut")["hazelnut"],
        image_decoder(job, detector),
        references_of(job),
    )
    run, source = Run("run", job, "alfa-small", "0" * 64), Store(str(dataset))
    prepare_class(run, prompts, Neighbours(rows), detector, source, output, "me")
    expected = []
    for row in rows:
        others = [other for other in rows if other is not row]
        made = make_memory(prompts, Neighbours(others), detector, job, source, Spans(job, source, {}))
        known = replace(prompts, memory=made.references)
        pixels = torch.tensor(decode(Path(row["uri"]).read_bytes()).pixels).permute(2, 0, 1)[None]
        found = detector.detect(pixels, [known])[0]
        expected.append((found.score, found.grid.max()))
    stored = read_memory("run", "hazelnut", output)
    assert stored is not None
    np.testing.assert_allclose(stored.scores, expected, atol=1e-5)
    cut = reference_thresholds("run", ["hazelnut"], 0.99, output)["hazelnut"]
    low, high = sorted(score for score, _ in expected)[1:]
    assert cut.score == pytest.approx(low + 0.98 * (high - low), abs=1e-5)  # at 0.99 x 2 = 1.98 of places 0, 1, 2


def test_one_reference_gives_no_threshold(dataset: Path, tmp_path: Path) -> None:
    one = job_for(dataset, tmp_path, "references.shots=1", "threshold.policy=reference", "dataset.class_name=hazelnut")
    with pytest.raises(ThresholdError, match="'hazelnut' has 1; give it two"):
        plan_run(one, open_source(one, Store(one.output.uri)), tmp_path, Store(one.output.uri))
    with pytest.raises(JobError, match="needs references"):
        parse_job({"dataset": {"images": "x"}, "output": {"uri": "y"}}, ["threshold.policy=reference"])
