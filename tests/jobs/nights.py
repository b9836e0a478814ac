"""Publishes nights of the demo's photos as if they had been scored, without Ray and a model."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.planning import class_fingerprints
from pipeline.alfa import locate_weights, text_fits
from pipeline.images import list_images, open_dataset
from pipeline.lake import publish_night
from pipeline.prompts import compose_ensemble, make_offline
from pipeline.storage import Run, Store
from schemas.job import JobConfig, parse_job
from tests.nights import write_shard
from tests.places import DEMO
from tests.stats import write_stats


def job_of(folder: Path, night: str, **keys: Any) -> JobConfig:
    dataset = {"images": str(folder / "in"), "select": "new", **keys.pop("dataset", {})}
    document = {"dataset": dataset, "output": {"uri": str(folder / "out")}, "run_date": night, **keys}
    return parse_job(document)


def publish_as_scored(job: JobConfig, failed: Collection[str] = (), **stats: Any) -> None:
    """Publishes all images of the job as its night. failed: keys of those that are errors. stats: what its run's
    stats.json says."""
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
            "status": "error" if image["key"] in failed else "ok",
            "error_type": "corrupt" if image["key"] in failed else None,
            "score": None if image["key"] in failed else 0.4,
            "is_anomalous": None if image["key"] in failed else False,
            "prompt_fingerprint": ensembles[image["class_name"]].fingerprint,
        }
        for image in images
    ]
    write_shard(output, run, "one", rows)
    fingerprints = class_fingerprints(job, weights, ensembles.values(), {})
    publish_night(run, "m" * 12, run.shards, ["one"], output, "test", fingerprints)
    if stats:
        write_stats(output, run.run_id, **{"model": run.model, **stats})


def copy_photos(folder: Path) -> None:
    """Three photos of each of two classes, below folder/in."""
    for name in ("hazelnut", "capsules"):
        (folder / "in" / name).mkdir(parents=True)
        for photo in sorted(DEMO.glob(f"{name}/test/*/*.jpg"))[:3]:
            shutil.copy(photo, folder / "in" / name / f"{photo.parent.name}-{photo.name}")
