"""Published nights made of generated rows: no model, no Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.lake import publish_night
from pipeline.prompts import compose_ensemble, record_prompts
from pipeline.storage import Run, Store, paths
from schemas.job import dump_job_yaml, parse_job
from schemas.prompts import PromptSet, Usage
from schemas.records import Commit
from tests.nights import NIGHT, WEIGHTS, write_shard
from tests.stats import write_stats

THRESHOLD = 0.6
GRID = (6, 8)
DEFECTS = [{"name": f"defect {n}", "look": f"a mark of kind {n}"} for n in range(5)]


def prompt_set(class_name: str, **changes: Any) -> PromptSet:
    """A set that an LLM has made in two calls."""
    description = {"domain": "object", "normal": [f"look {n}" for n in range(5)], "defects": DEFECTS, **changes}
    return PromptSet(
        class_name=class_name,
        source="llm",
        recipe="0" * 12,
        description=description,  # type: ignore[arg-type]
        model="maker/model",
        usage=Usage(calls=2, prompt_tokens=300, completion_tokens=100, cost_usd=0.0125),
        created_at=datetime(2026, 1, 1, tzinfo=timezone.utc),
    )


def save_photo(path: Path, seed: int) -> None:
    """A photo of noise, 200 x 150: noise compresses badly, so its thumbnails are as large as they get."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=95)


def scored(key: str, class_name: str, score: float, photos: Path, **changes: Any) -> dict[str, Any]:
    """A row with status ok: the map has one hot patch, the first prompt of each side was dropped."""
    grid = np.full(GRID, 0.2, np.float32)
    grid[1, 2] = score
    region = {"x": 50, "y": 25, "width": 25, "height": 25, "area": 600, "peak": score, "defect": "defect 1"}
    evidence = {"prompt": f"a damaged {class_name}", "defect": "defect 1", "weight": 0.25, "similarity": 0.3}
    return {
        "class_name": class_name,
        "image_key": key,
        "image_uri": str(photos / key),
        "status": "ok",
        "width": 200,
        "height": 150,
        "score": score,
        "score_global": score,
        "score_local": score,
        "threshold": THRESHOLD,
        "mask_threshold": 0.5,
        "is_anomalous": score >= THRESHOLD,
        "mask_area": 0.02,
        "regions": [region] if score >= THRESHOLD else [],
        "explanation": [evidence],
        "grid": grid.ravel(),
        "grid_width": GRID[1],
        **changes,
    }


def failed(key: str, class_name: str, photos: Path, message: str, error_type: str = "corrupt") -> dict[str, Any]:
    """A row with status error."""
    return {
        "class_name": class_name,
        "image_key": key,
        "image_uri": str(photos / key),
        "status": "error",
        "error_type": error_type,
        "error_message": message,
    }


def publish(
    folder: Path,
    photos: Path,
    rows: Sequence[Mapping[str, Any]],
    sets: Sequence[PromptSet] = (),
    night: str = NIGHT,
    overrides: Sequence[str] = (),
    spans: Mapping[str, tuple[float, float]] | None = None,
    **stats: Any,
) -> Commit:
    """Publishes rows as a night, with a job of these overrides; returns the commit."""
    output = Store(str(folder))
    document = {"dataset": {"images": str(photos)}, "output": {"uri": str(folder)}, "run_date": night}
    job = parse_job(document, overrides)
    run = Run(f"{night}-{'a' * 12}", job, "ViT-test/weights", WEIGHTS)
    records = record_prompts(sets, [compose_ensemble(item, lambda _: True) for item in sets])
    prompts = {item.ensemble.class_name: item.ensemble.prompts for item in records.classes}
    output.write(paths.run_key(run.run_id, "job.yaml"), dump_job_yaml(job).encode())
    output.write(paths.run_key(run.run_id, "prompts.json"), records.model_dump_json().encode())
    rates = {"images_per_second": 7.5, "scoring_images_per_second": 12.5}
    facts = {"scored_by_this_job": len(rows), **rates, "embedded_model": False}
    usage = {"calls": 4, "prompt_tokens": 600, "completion_tokens": 200, "cost_usd": 0.025}
    write_stats(output, run.run_id, **{**facts, "usage": usage, **stats})
    shards = []
    for start in range(0, len(rows), 256):
        shard = f"{start:016x}"
        part = []
        for row in rows[start : start + 256]:
            sides = [prompt.side for prompt in prompts.get(row["class_name"], ())]
            kept = [side in sides[:place] for place, side in enumerate(sides)] if row["status"] == "ok" else None
            image_id = hashlib.blake2b(row["image_uri"].encode(), digest_size=16).hexdigest()
            part.append({"image_id": image_id, "prompts_kept": kept or None, **row})
        write_shard(output, run, shard, part)
        shards.append(shard)
    return publish_night(run, "m" * 12, run.shards, shards, output, "test", spans=spans)
