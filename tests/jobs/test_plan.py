"""Tests that a plan describes the night correctly, and writes nothing."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from jobs.plan import plan_night, run_plan
from pipeline.prompts import make_offline
from pipeline.storage import Store
from schemas.job import JobConfig
from schemas.prompts import PromptSet, Usage
from tests.jobs.nights import copy_photos, job_of, publish_as_scored
from tests.nights import FIRST, SECOND
from tests.scoring.runs import shards_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy_photos(tmp_path)
    return tmp_path


def said(job: JobConfig, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """The plan for a person, and for a machine."""
    text = io.StringIO()
    assert run_plan(job, Console(file=text, width=300)) == 0
    assert run_plan(job, Console(quiet=True), as_json=True) == 0
    return text.getvalue(), json.loads(capsys.readouterr().out)


def test_a_first_night_is_planned_from_its_images_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ray.shutdown()
    (folder / "in" / "hazelnut" / "empty.jpg").touch()
    (folder / "in" / "hazelnut" / "scan.png").write_bytes(b"x" * 1_000_000)
    (folder / "in" / "hazelnut" / "thumb.png").write_bytes(b"x" * 100)
    for name in ("a.nef", "b.NEF", "LICENSE"):
        (folder / "in" / name).touch()
    text, plan = said(job_of(folder, FIRST, dataset={"select": "all"}, engine={"shard_size": 4}), capsys)
    assert [(item["class_name"], item["images"], item["prompts"]) for item in plan["classes"]] == [
        ("capsules", 3, "bundled"),
        ("hazelnut", 6, "bundled"),
    ]
    files = plan["files"]
    sizes = sorted(path.stat().st_size for path in (folder / "in").rglob("*.[jp]*g"))
    assert plan["left_out"] == {".nef": 2, "none": 1} and "skipped  by suffix: 2 .nef, 1 without suffix" in text
    assert (files["images"], files["bytes"], files["median"], plan["shards"]) == (9, sum(sizes), sizes[4], 3)
    assert files["largest"][0] == {"uri": str(folder / "in/hazelnut/scan.png"), "bytes": 1_000_000}
    assert [file["bytes"] for file in files["odd"]] == [1_000_000, 100] and files["odd_count"] == 2
    assert files["empty"] == [str(folder / "in/hazelnut/empty.jpg")] and files["empty_count"] == 1
    assert plan["selection"] is plan["pace"] is plan["cost"] is plan["result_bytes"] is None
    assert plan["run_id"].startswith(FIRST) and plan["is_published"] is False
    assert "time  unknown: no run has scored with this model here yet" in text and "LLM  is not asked" in text
    assert not (folder / "out").exists() and not ray.is_initialized()


def test_a_later_night_is_planned_by_the_last_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    actors = {"count": 2, "cpus": 4, "gpus": 0.5}
    for night, rate in (("2025-12-30", 90.0), ("2025-12-31", 100.0), (FIRST, 300.0)):
        publish_as_scored(job_of(folder, night), scoring_images_per_second=rate, actors=actors)
    publish_as_scored(job_of(folder, "2025-12-29"), scoring_images_per_second=1.0, model="another")
    before = sorted(folder.rglob("*"))
    photo = next((folder / "in" / "hazelnut").iterdir())
    for number in range(4):
        shutil.copy(photo, folder / "in" / "hazelnut" / f"z{number}.jpg")
    text, plan = said(job_of(folder, SECOND), capsys)
    assert plan["selection"] == {"listed": 10, "scored": 6, "given_up": 0} and plan["files"]["images"] == 4
    assert plan["pace"] == {"runs": 3, "images_per_second": 100.0, "cores": 8.0, "gpus": 1.0}
    assert plan["cost"] == {"hours": 4 / 100 / 3600, "core_hours": 8 * 4 / 100 / 3600, "gpu_hours": 4 / 100 / 3600}
    assert plan["result_bytes"] > 0 and "4 of 10 listed; 6 scored in other nights, 0 given up" in text
    assert sorted(path for path in folder.rglob("*") if not path.name.startswith("z")) == before


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (100.0, "1 s of scoring, at the 100 images/s of the last run"),
        (0.05, "2 min of scoring, 0.27 core hours"),
        (0.001, "1.7 h of scoring, 13.33 core hours"),
    ],
)
def test_the_time_of_a_night_is_said_in_units_that_suit_it(
    rate: float, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    actors = {"count": 2, "cpus": 4, "gpus": 0}
    publish_as_scored(job_of(folder, FIRST), scoring_images_per_second=rate, actors=actors)
    assert words in said(job_of(folder, SECOND, dataset={"select": "all"}), capsys)[0]


def test_classes_that_the_llm_is_asked_for_are_named_with_what_others_have_cost(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Store(str(folder / "out"))
    job = job_of(folder, FIRST, dataset={"select": "all"}, prompts={"llm": "openai/test"})
    text, plan = said(job, capsys)
    assert plan["run_id"] is None and plan["usage_a_class"] is None
    assert "is asked for 2 classes: capsules, hazelnut; cost unknown" in text
    assert "run  unknown until the LLM has described the classes" in text
    for name, tokens in (("bolt", 100), ("nut", 300)):
        made = make_offline("hazelnut").model_copy(
            update={
                "class_name": name,
                "source": "llm",
                "model": "openai/test",
                "usage": Usage(calls=1, prompt_tokens=tokens, completion_tokens=10, cost_usd=tokens / 100_000),
            }
        )
        output.write(f"prompts/{name}/x.json", PromptSet.model_validate(made.model_dump()).model_dump_json().encode())
    text, plan = said(job, capsys)
    assert plan["usage_a_class"] == {"calls": 1, "prompt_tokens": 200, "completion_tokens": 10, "cost_usd": 0.002}
    assert "about 420 tokens, about 0.0040 USD, going by earlier classes" in text


def test_a_run_that_is_published_or_under_way_is_recognised(folder: Path) -> None:
    job = job_of(folder, FIRST, dataset={"select": "all"})
    plan = plan_night(job)
    assert plan.run_id is not None and plan.finished_shards == 0
    (shard,) = shards_of(job)
    Store(str(folder / "out")).write(f"runs/{plan.run_id}/shards/{shard.shard_id}.arrow", b"")
    assert plan_night(job).finished_shards == 1
