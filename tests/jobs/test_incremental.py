"""Tests nights that score only new photos, as far as that needs neither Ray nor a model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from jobs.planning import open_source, plan_run
from jobs.score import run_score
from pipeline.images import DatasetError
from pipeline.lake import read_commit
from pipeline.prompts import make_offline
from pipeline.storage import Store, paths
from schemas.job import JobConfig
from tests.command import alfa
from tests.jobs.nights import copy_photos, job_of, publish_as_scored
from tests.nights import FIRST, FOURTH, SECOND, THIRD


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of two classes, all of them published as the first night."""
    copy_photos(tmp_path)
    publish_as_scored(job_of(tmp_path, FIRST))
    return tmp_path


def planned(job: JobConfig, scratch: Path) -> list[str]:
    """The keys of the images that a night is left with."""
    output = Store(job.output.uri)
    plan = plan_run(job, open_source(job, output), scratch, output)
    return [key for batch in plan.manifest.batches(["key"]) for key in batch.column("key").to_pylist()]


def test_a_night_with_nothing_new_is_published_empty_without_ray(folder: Path) -> None:
    ray.shutdown()
    where = ("--images", folder / "in", "--output", folder / "out", "--run-date", SECOND)
    sets = ("--set", "dataset.select=new", "--set", "lake.format=iceberg")
    done = alfa("score", *where, *sets, RAY_ADDRESS="127.0.0.1:1")  # no Ray answers there
    assert done.returncode == 0, done.stderr
    assert "6 images listed: 6 were scored in another night" in done.stderr
    assert "new  0; 6 listed, 6 scored in other nights, 0 given up" in done.stdout
    assert "images  0, 0 ok; errors: none" in done.stdout and "nothing was left to score" in done.stdout
    output = Store(str(folder / "out"))
    commit = read_commit(output, SECOND)
    assert commit is not None and (commit.rows, commit.files, commit.select) == (0, (), "new")
    stats = json.loads(output.read(paths.run_key(commit.run_id, "stats.json")))
    assert stats["state"] == "done" and stats["selection"] == {"listed": 6, "scored": 6, "given_up": 0}
    page = output.read(paths.report_key(commit.run_id)).decode()
    assert "Nothing was new." in page and "Of 6 images listed, 6 were scored in another night" in page
    assert not list(output.list(f"scores/run_date={SECOND}"))
    assert run_score(job_of(folder, SECOND), Console(quiet=True)) == 0 and not ray.is_initialized()
    assert read_commit(output, SECOND) == commit


def test_what_arrived_or_changed_is_new_and_what_was_scored_otherwise_too(folder: Path) -> None:
    assert planned(job_of(folder, SECOND), folder) == []
    assert len(planned(job_of(folder, FIRST), folder)) == 6  # the same night again
    changed, *_ = sorted((folder / "in" / "hazelnut").iterdir())
    os.utime(changed, ns=(1, 1))
    shutil.copy(changed, folder / "in" / "hazelnut" / "z-arrived.jpg")
    shutil.copytree(folder / "in" / "hazelnut", folder / "in" / "walnut")
    shutil.rmtree(folder / "in" / "capsules")
    arrived = [f"hazelnut/{changed.name}", "hazelnut/z-arrived.jpg"]
    found = planned(job_of(folder, SECOND), folder)
    assert found[:2] == arrived and all(key.startswith("walnut/") for key in found[2:]) and len(found) == 6
    assert len(planned(job_of(folder, SECOND, method={"adaptation": "none"}), folder)) == 8
    assert len(planned(job_of(folder, SECOND, prompts={"described": False}), folder)) == 8
    assert len(planned(job_of(folder, SECOND, dataset={"select": "all"}), folder)) == 8
    assert planned(job_of(folder, SECOND, threshold={"value": 0.7}), folder) == found  # raw scores are the same


def test_errors_are_tried_again_in_as_many_nights_as_the_job_says(folder: Path) -> None:
    broken = min(f"capsules/{path.name}" for path in (folder / "in" / "capsules").iterdir())
    publish_as_scored(job_of(folder, FIRST), failed=[broken])
    assert planned(job_of(folder, SECOND), folder) == [broken]
    assert planned(job_of(folder, SECOND, dataset={"retry_errors": False}), folder) == []
    publish_as_scored(job_of(folder, SECOND), failed=[broken])
    assert planned(job_of(folder, THIRD, dataset={"retry_nights": 1}), folder) == []
    assert planned(job_of(folder, THIRD, dataset={"retry_nights": 2}), folder) == [broken]
    publish_as_scored(job_of(folder, SECOND))
    assert planned(job_of(folder, THIRD, dataset={"retry_nights": 2}), folder) == []


def test_teams_methods_and_outputs_do_not_mix(folder: Path) -> None:
    """The other team's photos have the same names, bytes and times, and lie elsewhere."""
    shutil.copytree(folder / "in", folder / "theirs")
    theirs: dict[str, Any] = {"dataset": {"images": str(folder / "theirs")}}
    assert len(planned(job_of(folder, SECOND, **theirs), folder)) == 6
    publish_as_scored(job_of(folder, SECOND, **theirs))
    for keys in ({}, theirs):
        assert planned(job_of(folder, THIRD, **keys), folder) == []
    changed = min((folder / "theirs" / "hazelnut").iterdir())
    os.utime(changed, ns=(1, 1))
    assert planned(job_of(folder, THIRD), folder) == []
    assert planned(job_of(folder, THIRD, **theirs), folder) == [f"hazelnut/{changed.name}"]

    other: dict[str, Any] = {"method": {"adaptation": "none"}}
    assert len(planned(job_of(folder, THIRD, **other), folder)) == 6
    publish_as_scored(job_of(folder, THIRD, **other))
    for keys in ({}, other):
        assert planned(job_of(folder, FOURTH, **keys), folder) == []
    assert len(planned(job_of(folder, FOURTH, **other, **theirs), folder)) == 6
    assert len(planned(job_of(folder, FOURTH, output={"uri": str(folder / "another")}), folder)) == 6

    # A night has one commit: who publishes another team's night anew takes its photos out, and they are scored again.
    publish_as_scored(job_of(folder, FIRST, **theirs))
    assert len(planned(job_of(folder, FOURTH), folder)) == 6
    assert planned(job_of(folder, FOURTH, **other), folder) == []


def test_prompts_that_were_edited_make_their_class_new(folder: Path) -> None:
    output, job = Store(str(folder / "out")), job_of(folder, SECOND)
    prompt_set = make_offline("hazelnut")
    assert prompt_set.description is not None
    edited = prompt_set.description.model_copy(update={"normal": ("a whole shell",) * 5})
    key = f"prompts/hazelnut/{prompt_set.recipe}.json"
    output.write(key, prompt_set.model_dump_json().encode())
    assert planned(job, folder) == []
    output.write(key, prompt_set.model_copy(update={"description": edited}).model_dump_json().encode())
    assert [key.split("/")[0] for key in planned(job, folder)] == ["hazelnut"] * 3


def test_a_day_without_images_is_no_fault_of_an_output_that_has_nights(folder: Path) -> None:
    sunday = {"images": str(folder / "in" / "{run_date}")}
    assert run_score(job_of(folder, SECOND, dataset=sunday), Console(quiet=True)) == 0
    commit = read_commit(Store(str(folder / "out")), SECOND)
    assert commit is not None and commit.rows == 0
    with pytest.raises(DatasetError, match="no images"):
        run_score(job_of(folder, THIRD, dataset={**sunday, "select": "all"}), Console(quiet=True))
    elsewhere = job_of(folder, THIRD, dataset=sunday, output={"uri": str(folder / "another")})
    with pytest.raises(DatasetError, match="no images"):
        run_score(elsewhere, Console(quiet=True))
