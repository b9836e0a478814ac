"""Shards scored in this process: no Ray, the embedded model."""

from __future__ import annotations

from pathlib import Path

from pipeline.alfa import Detector, PromptEmbeddings
from pipeline.images import list_images, open_dataset
from pipeline.prompts import compose_ensemble, obtain
from pipeline.scoring import Shard, cut_shards, score_shard
from pipeline.storage import Run, Store, read_shard
from schemas.job import JobConfig, parse_job


def job_for(images: Path, output: Path, *overrides: str) -> JobConfig:
    document = {"dataset": {"images": str(images)}, "output": {"uri": str(output)}, "run_date": "2026-01-02"}
    return parse_job(document, overrides)


def shards_of(job: JobConfig) -> list[Shard]:
    return list(cut_shards(list_images(open_dataset(job.dataset, job.storage)), job.engine.shard_size))


def embed(detector: Detector, job: JobConfig, *classes: str) -> dict[str, PromptEmbeddings]:
    store = Store(job.output.uri)
    sets = (obtain(store, name, job.prompts, owner="test") for name in classes)
    return {item.class_name: detector.embed(compose_ensemble(item, lambda _: True)) for item in sets}


def score(detector: Detector, job: JobConfig, *classes: str) -> list[dict[str, object]]:
    """Rows of all shards, scored in this process."""
    run, output = Run("run", job, "alfa-small", "0" * 64), Store(job.output.uri)
    prompts, rows = embed(detector, job, *classes), []
    for shard in shards_of(job):
        stats = score_shard(shard, run, detector, prompts, Store(job.dataset.images), output, threads=4)
        table = read_shard(output, run.shards, shard.shard_id)
        assert (stats.images, sum(stats.errors.values())) == (
            table.num_rows,
            table.column("error_type").drop_null().length(),
        )
        rows += table.to_pylist()
    return rows
