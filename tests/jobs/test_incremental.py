"""Nights that take what is new alone, as far as that needs neither Ray nor a model."""

from __future__ import annotations

import io
import json
import os
import shutil
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from rich.console import Console

from jobs.planning import class_fingerprints, open_source, plan_run
from jobs.score import run_score
from pipeline.alfa import locate_weights, text_fits
from pipeline.images import DatasetError, list_images, open_dataset
from pipeline.lake import publish_night, read_commit
from pipeline.prompts import compose_ensemble, make_offline
from pipeline.storage import Run, Store, paths
from schemas.job import JobConfig, parse_job
from schemas.tables import SHARD
from tests.places import DEMO

FIRST, SECOND, THIRD = "2026-01-01", "2026-01-02", "2026-01-03"


def job_of(folder: Path, night: str, **keys: Any) -> JobConfig:
    dataset = {"images": str(folder / "in"), "select": "new", **keys.pop("dataset", {})}
    document = {"dataset": dataset, "output": {"uri": str(folder / "out")}, "run_date": night, **keys}
    return parse_job(document)


def publish_as_scored(job: JobConfig) -> None:
    """Publishes all images of the job as its night, as if they had been scored by its model."""
    output, weights, fits = Store(job.output.uri), locate_weights(job.model), text_fits(job.model)
    images = pa.Table.from_batches(list_images(open_dataset(job.dataset, job.storage))).to_pylist()
    names = sorted({image["class_name"] for image in images})
    ensembles = {name: compose_ensemble(make_offline(name), fits) for name in names}
    run = Run(f"{job.run_date}-{'a' * 12}", job, weights.label, weights.sha256)
    rows = [
        {
            "class_name": image["class_name"],
            "image_key": image["key"],
            "image_id": image["image_id"],
            "image_uri": image["uri"],
            "image_etag": image["etag"],
            "run_id": run.run_id,
            "shard_id": "one",
            "status": "ok",
            "score": 0.4,
            "is_anomalous": False,
            "prompt_fingerprint": ensembles[image["class_name"]].fingerprint,
            "model": run.model,
            "weights_sha256": run.weights_sha256,
            "scored_at": datetime(2026, 1, 1, tzinfo=timezone.utc),
        }
        for image in images
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SHARD), buffer)
    output.write(paths.shard_key(run.shards, "one"), buffer.getvalue())
    fingerprints = class_fingerprints(job, weights, ensembles.values(), {})
    publish_night(run, "m" * 12, run.shards, ["one"], output, "test", fingerprints)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of two classes, all of them published as the first night."""
    for name in ("hazelnut", "capsules"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for photo in sorted(DEMO.glob(f"{name}/test/*/*.jpg"))[:3]:
            shutil.copy(photo, tmp_path / "in" / name / f"{photo.parent.name}-{photo.name}")
    publish_as_scored(job_of(tmp_path, FIRST))
    return tmp_path


def planned(job: JobConfig, scratch: Path) -> list[str]:
    """The keys of the images that a night is left with."""
    output = Store(job.output.uri)
    plan = plan_run(job, open_source(job, output), scratch, output)
    return [key for batch in plan.manifest.batches(["key"]) for key in batch.column("key").to_pylist()]


def test_a_night_with_nothing_new_is_published_empty_without_ray(folder: Path) -> None:
    text = io.StringIO()
    assert run_score(job_of(folder, SECOND), Console(file=text, width=200)) == 0
    assert not ray.is_initialized()
    output, commit = Store(str(folder / "out")), read_commit(Store(str(folder / "out")), SECOND)
    assert commit is not None and (commit["rows"], commit["files"], commit["select"]) == (0, [], "new")
    stats = json.loads(output.read(paths.run_key(commit["run_id"], "stats.json")))
    assert stats["state"] == "done" and stats["selection"] == {"listed": 6, "scored": 6, "given_up": 0}
    page = output.read(paths.report_key(commit["run_id"])).decode()
    assert "Nothing was new." in page and "Of 6 images listed, 6 have a score from another night" in page
    assert "new  0; 6 listed, 6 scored in other nights, 0 given up" in text.getvalue()
    assert not list(output.list(f"scores/run_date={SECOND}"))
    again = io.StringIO()
    assert run_score(job_of(folder, SECOND), Console(file=again, width=200)) == 0
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
    assert commit is not None and commit["rows"] == 0
    with pytest.raises(DatasetError, match="no images"):
        run_score(job_of(folder, THIRD, dataset={**sunday, "select": "all"}), Console(quiet=True))
    elsewhere = job_of(folder, THIRD, dataset=sunday, output={"uri": str(folder / "another")})
    with pytest.raises(DatasetError, match="no images"):
        run_score(elsewhere, Console(quiet=True))
