"""Tests photos of 12 megapixels with a defect of 12 pixels, whole and in tiles, in processes of measured memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipeline.alfa import Detector, load_encoder, locate_weights
from pipeline.images import list_images, open_dataset
from pipeline.scoring import Neighbours, prepare_class, score_shard
from pipeline.storage import Run, Store, read_shard
from schemas.job import parse_job
from tests.places import DEMO
from tests.scoring.runs import embed, shards_of

SIZE = (4000, 3000)
BLOT = (2600, 1900, 2611, 1911)
TILES = ["method.tile.size=400", "method.tile.overlap=100"]
MOST_MEMORY = 3 << 30


def score(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Scores in/ against the references in known/, if asked for; the rows by image, and the memory it took."""
    document = {"dataset": {"images": str(folder / "in")}, "output": {"uri": str(folder / "out")}}
    job = parse_job(document, ["run_date=2026-01-02", "threshold.mask_value=1.9", *overrides])
    encoder = load_encoder(job.model, locate_weights(job.model))
    detector = Detector(encoder, job.resolved_method, job.references)
    prompts, output, source = embed(detector, job, "hazelnut"), Store(job.output.uri), Store(job.dataset.images)
    run = Run("run", job, "m", "0" * 64)
    if job.references is not None:
        known = open_dataset(job.dataset.model_copy(update={"images": job.references.images}), job.storage)
        rows = [row for batch in list_images(known) for row in batch.to_pylist()]
        prompts["hazelnut"] = prepare_class(run, prompts["hazelnut"], Neighbours(rows), detector, source, output, "me")
    (shard,) = shards_of(job)
    score_shard(shard, run, detector, prompts, source, output, threads=2)
    rows = read_shard(output, "runs/run/shards", shard.shard_id).to_pylist()
    names = ("score", "score_local", "score_reference", "grid", "grid_width", "width", "mask_uri", "shots")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"memory": memory, **{Path(row["image_key"]).stem: {name: row[name] for name in names} for row in rows}}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hazelnut enlarged to 12 megapixels, the same with a blot, and another one as reference."""
    folder = tmp_path_factory.mktemp("large")
    for part in ("in", "known"):
        (folder / part / "hazelnut").mkdir(parents=True)
    first, second = (
        Image.open(path).convert("RGB").resize(SIZE) for path in sorted((DEMO / "hazelnut/test/good").iterdir())[:2]
    )
    second.save(folder / "known/hazelnut/known.png", compress_level=1)
    first.save(folder / "in/hazelnut/clean.png", compress_level=1)
    ImageDraw.Draw(first).ellipse(BLOT, fill=(225, 60, 140))
    first.save(folder / "in/hazelnut/blot.png", compress_level=1)
    return folder


def in_a_process(folder: Path, overrides: list[str]) -> dict[str, Any]:
    arguments = [sys.executable, "-m", "tests.scoring.test_large_photos", str(folder), *overrides]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def raised(found: dict[str, Any]) -> tuple[float, int, int]:
    """How much the blot raises the map where it raises it most, and that place in pixels of the photo."""
    clean, blot = (np.array(found[name]["grid"]).reshape(-1, found[name]["grid_width"]) for name in ("clean", "blot"))
    y, x = np.unravel_index(np.argmax(blot - clean), blot.shape)
    place = int((x + 0.5) * SIZE[0] / blot.shape[1]), int((y + 0.5) * SIZE[1] / blot.shape[0])
    return float((blot - clean).max()), *place


@pytest.mark.slow
def test_tiles_find_a_defect_of_12_pixels_that_the_whole_does_not_show(photos: Path) -> None:
    whole, tiled = in_a_process(photos, []), in_a_process(photos, TILES)
    before, *_ = raised(whole)
    after, x, y = raised(tiled)
    assert after > 10 * before
    assert abs(x - 2605) <= 60 and abs(y - 1905) <= 60  # two patches of a tile
    for name in ("clean", "blot"):
        row = tiled[name]
        assert (row["width"], row["grid_width"], len(row["grid"])) == (4000, 160, 160 * 120)
        assert Image.open(row["mask_uri"]).size == SIZE
    assert tiled["memory"] < MOST_MEMORY


@pytest.mark.slow
def test_tiles_with_a_reference_rank_the_photo_with_the_defect_first(photos: Path) -> None:
    found = in_a_process(photos, [*TILES, f"references.images={photos / 'known'}"])
    clean, blot = found["clean"], found["blot"]
    assert clean["shots"] == blot["shots"] == 1
    assert blot["score_reference"] > clean["score_reference"] and blot["score"] > clean["score"]
    assert found["memory"] < MOST_MEMORY


if __name__ == "__main__":
    print(json.dumps(score(Path(sys.argv[1]), sys.argv[2:])))
