"""Shards scored in this process: no Ray, the embedded model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from pipeline.alfa import Detector, PromptEmbeddings, load_encoder, locate_weights
from pipeline.images import list_images, open_dataset
from pipeline.prompts import compose_ensemble, obtain
from pipeline.scoring import Shard, cut_shards, score_shard, write_manifest
from pipeline.storage import Run, Store, read_shard
from schemas.job import JobConfig, parse_job
from tests.places import DEMO


def job_for(images: Path, output: Path, *overrides: str) -> JobConfig:
    document = {"dataset": {"images": str(images)}, "output": {"uri": str(output)}, "run_date": "2026-01-02"}
    return parse_job(document, overrides)


def load_detector(job: JobConfig) -> Detector:
    """The detector of a job without references."""
    return Detector(load_encoder(job.model, locate_weights(job.model)), job.resolved_method)


def cut_batches(batches: Iterable[pa.RecordBatch], size: int) -> list[Shard]:
    """The shards of listed images."""
    with tempfile.TemporaryDirectory() as folder:
        return list(cut_shards(write_manifest(batches, Path(folder)), size))


def shards_of(job: JobConfig) -> list[Shard]:
    return cut_batches(list_images(open_dataset(job.dataset, job.storage)), job.engine.shard_size)


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


def comparable_rows(output: Store, run: Run, shard: Shard) -> list[dict[str, Any]]:
    """Rows of a scored shard with the bytes of their masks, without what differs between outputs."""
    rows: list[dict[str, Any]] = read_shard(output, run.shards, shard.shard_id).to_pylist()
    for row in rows:
        uri = row.pop("mask_uri")
        row["mask"] = None if uri is None else Path(uri).read_bytes()
        del row["scored_at"]
    return rows


def write_mixed_photos(root: Path) -> Path:
    """Writes eleven photos of the class nut, one of them of 16 bits, and three files that are none; returns root."""
    folder = root / "nut"
    folder.mkdir()
    for number, path in enumerate(sorted(DEMO.glob("hazelnut/test/*/*.jpg"))[:10]):
        (folder / f"{number:02}.jpg").write_bytes(path.read_bytes())
    (folder / "03-broken.jpg").write_bytes(b"broken")
    (folder / "04-empty.jpg").touch()
    (folder / "08-cut.jpg").write_bytes((folder / "00.jpg").read_bytes()[:3000])
    with Image.open(folder / "01.jpg") as image:
        image.convert("I").point(lambda value: value * 16).convert("I;16").save(folder / "05-deep.png")
    return root
