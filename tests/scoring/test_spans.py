"""Photos of more than 8 bits a channel are scored as those of 8 bits of the same scene."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.alfa import Detector
from pipeline.images import list_images, measure_image, open_dataset
from pipeline.prompts import compose_ensemble, obtain
from pipeline.scoring import (
    SAMPLE_COLUMNS,
    choose_samples,
    cut_shards,
    read_spans,
    score_shard,
    write_manifest,
    write_samples,
)
from pipeline.storage import Run, Store, paths, read_shard
from schemas.job import JobConfig, parse_job
from tests.images.deep_files import as_png, as_pnm, as_tiff, deep
from tests.places import DEMO
from tests.scoring.runs import load_detector

PHOTOS = [DEMO / "hazelnut/test" / name for name in ("good/02.jpg", "colour/01.jpg")]
SIDE = 128


@pytest.fixture(scope="module")
def detector() -> Detector:
    job = job_for(DEMO, DEMO)
    return load_detector(job)


def job_for(images: Path, output: Path, *overrides: str) -> JobConfig:
    document = {"dataset": {"images": str(images)}, "output": {"uri": str(output)}, "run_date": "2026-01-02"}
    return parse_job(document, overrides)


def score(
    detector: Detector, job: JobConfig, scratch: Path, earlier: dict[str, tuple[float, float]] | None = None
) -> dict[str, dict[str, Any]]:
    """Rows by key, scored as a night scores them, each photo in a shard of its own."""
    output = Store(job.output.uri)
    manifest = write_manifest(list_images(open_dataset(job.dataset, job.storage)), scratch)
    if job.dataset.bit_depth is None:
        write_samples("run", choose_samples(manifest.batches(SAMPLE_COLUMNS)), earlier or {}, output)
    known = detector.embed(compose_ensemble(obtain(output, "hazelnut", job.prompts, owner="t"), lambda _: True))
    prompts, run = dict.fromkeys(manifest.classes, known), Run("run", job, "alfa-small", "0" * 64)
    rows = []
    for shard in cut_shards(manifest, 1):
        stats = score_shard(shard, run, detector, prompts, Store(job.dataset.images), output, threads=2)
        (row,) = read_shard(output, run.shards, shard.shard_id).to_pylist()
        assert stats.clipped == bool(row["clipped"])
        rows.append(row)
    return {row["image_key"]: row for row in rows}


def pixels_of(path: Path, mode: str) -> NDArray[np.uint16]:
    with Image.open(path) as image:
        return np.asarray(image.convert(mode).resize((SIDE, SIDE))).astype(np.uint16)


def save(folder: Path, name: str, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def test_scores_are_those_of_8_bits(detector: Detector, tmp_path: Path) -> None:
    for number, path in enumerate(PHOTOS):
        for mode in ("L", "RGB"):
            pixels = pixels_of(path, mode)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "8.png")
            save(tmp_path / "in" / f"{mode}-8", f"{number}.png", (tmp_path / "8.png").read_bytes())
            for bits in (10, 12):
                save(tmp_path / "in" / f"{mode}-{bits}-png", f"{number}.png", as_png(deep(pixels, bits)))
            save(tmp_path / "in" / f"{mode}-12-tiff", f"{number}.tif", as_tiff(deep(pixels, 12)))
            save(tmp_path / "in" / f"{mode}-14-pnm", f"{number}.ppm", as_pnm(deep(pixels, 14)))
        Image.fromarray(pixels_of(path, "L").astype(np.float32) / 255).save(tmp_path / "f.tif")
        save(tmp_path / "in" / "L-float", f"{number}.tif", (tmp_path / "f.tif").read_bytes())
    rows = score(detector, job_for(tmp_path / "in", tmp_path / "out"), tmp_path)
    assert len(rows) == 22
    for key, row in rows.items():
        mode, kind, *_ = key.partition("/")[0].split("-")
        reference = rows[f"{mode}-8/{Path(key).stem}.png"]
        assert row["score"] == pytest.approx(reference["score"], abs=0.01), key
        assert row["bit_depth"] == (None if kind == "float" else int(kind)), key
        assert row["clipped"] == 0


def test_a_class_has_one_depth_and_keeps_it(detector: Detector, tmp_path: Path) -> None:
    pixels = pixels_of(PHOTOS[0], "L")
    for number in range(3):
        save(tmp_path / "in" / "nut", f"{number}-dark.png", as_png(deep(pixels // 5, 12) + number))
    save(tmp_path / "in" / "nut", "z-bright.png", as_png(deep(pixels, 12)))
    job = job_for(tmp_path / "in", tmp_path / "out")
    rows = score(detector, job, tmp_path)
    dark = measure_image((tmp_path / "in/nut/0-dark.png").read_bytes(), max_pixels=10**6)
    assert dark is not None and dark.high < 1024  # alone, they would be taken for 10 bits
    assert [row["bit_depth"] for row in rows.values()] == [12] * 4
    assert json.loads(Store(str(tmp_path / "out")).read(paths.span_key("run", "nut"))) == [0, 4095]
    late = deep(pixels, 12)
    late[5, 5:15] = 40_000
    save(tmp_path / "in" / "nut", "late.png", as_png(late))
    row = score(detector, job, tmp_path)["nut/late.png"]
    assert (row["bit_depth"], row["clipped"]) == (12, 10)


def test_a_depth_is_never_smaller_than_that_of_earlier_nights(detector: Detector, tmp_path: Path) -> None:
    pixels = pixels_of(PHOTOS[0], "L")
    fractions = (pixels / 255).astype(np.float32)
    for name, data in (("dark", as_png(deep(pixels // 5, 12))), ("bright", as_png(deep(pixels, 12)))):
        save(tmp_path / "in" / name, "a.png", data)
    (tmp_path / "in/range").mkdir()
    Image.fromarray(fractions * 3).save(tmp_path / "in/range/a.tif")
    earlier = {"dark": (0.0, 4095.0), "bright": (0.0, 1023.0), "range": (0.0, 1.0)}
    rows = score(detector, job_for(tmp_path / "in", tmp_path / "out"), tmp_path, earlier)
    assert {key: row["bit_depth"] for key, row in rows.items()} == {
        "bright/a.png": 12, "dark/a.png": 12, "range/a.tif": None,
    }  # fmt: skip
    assert rows["dark/a.png"]["clipped"] == rows["bright/a.png"]["clipped"] == 0
    assert rows["range/a.tif"]["clipped"] == (fractions * 3 > 1).sum() > 0
    found = read_spans("run", ["dark", "bright", "range", "none"], Store(str(tmp_path / "out")))
    assert found == {"dark": (0, 4095), "bright": (0, 4095), "range": (0, 1)}


def test_a_job_may_say_the_depth(detector: Detector, tmp_path: Path) -> None:
    save(tmp_path / "in" / "nut", "a.png", as_png(deep(pixels_of(PHOTOS[0], "L") // 5, 12)))
    job = job_for(tmp_path / "in", tmp_path / "out", "dataset.bit_depth=14")
    assert [row["bit_depth"] for row in score(detector, job, tmp_path).values()] == [14]
    assert job.scoring_facts() != job_for(tmp_path / "in", tmp_path / "out").scoring_facts()
