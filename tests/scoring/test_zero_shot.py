"""Tests the library's entry point: the README's example against the rows and masks of a night."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import Prediction, ZeroShotDetector
from pipeline.alfa import ModelError
from pipeline.images import ImageError, decode_mask
from pipeline.storage import Store
from schemas.job import JobError, Method
from schemas.prompts import Prompt, PromptEnsemble, PromptSet
from tests.places import DEMO, ROOT
from tests.scoring.runs import job_for, load_detector, score

PHOTO = DEMO / "hazelnut" / "test" / "colour" / "00.jpg"
GOOD = DEMO / "hazelnut" / "test" / "good" / "01.jpg"


@pytest.fixture(scope="module")
def detector() -> ZeroShotDetector:
    return ZeroShotDetector.from_pretrained(device="cpu")


def same(one: Prediction, other: Prediction) -> bool:
    return one.score == other.score and one.regions == other.regions and np.array_equal(one.grid, other.grid)


def test_the_readme_shows_ten_lines_that_run_without_ray() -> None:
    readme = (ROOT / "README.md").read_text()
    (section,) = re.findall(r"^## As a library$(.*?)^## ", readme, re.DOTALL | re.MULTILINE)
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(code.splitlines()) <= 10
    code += "import sys; assert not {'ray', 'litellm', 's3fs'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    good, bad = done.stdout.splitlines()
    assert good == "0.23 False []"
    assert bad == "0.88 True [('print', (142, 163, 269, 247))]"


def test_a_prediction_is_the_row_of_a_night(detector: ZeroShotDetector, tmp_path: Path) -> None:
    job = job_for(DEMO, tmp_path, "dataset.class_name=hazelnut", "model.device=cpu")
    night = score(load_detector(job), job, "hazelnut")
    rows = {str(row["image_uri"]): row for row in night}
    photos = [path for path in (PHOTO, GOOD) if str(path) in rows]
    assert len(photos) == 2
    for found, path in zip(detector.predict(photos, "hazelnut"), photos, strict=True):
        row = rows[str(path)]
        assert found.score == pytest.approx(row["score"], abs=1e-5) and found.is_anomalous == row["is_anomalous"]
        mask = decode_mask(Store(job.output.uri).read_uri(str(row["mask_uri"])))
        assert mask.any() == found.is_anomalous and np.array_equal(found.mask, mask)
        assert [(region.box, region.area, region.defect) for region in found.regions] == [
            ((r["x"], r["y"], r["x"] + r["width"], r["y"] + r["height"]), r["area"], r["defect"])
            for r in row["regions"]  # type: ignore[attr-defined]
        ]
        assert [evidence.prompt for evidence in found.explanation] == [
            evidence["prompt"]
            for evidence in row["explanation"]  # type: ignore[attr-defined]
        ]


def test_paths_bytes_images_and_arrays_are_photos_alike(detector: ZeroShotDetector) -> None:
    expected = detector.predict(str(PHOTO), "hazelnut")
    image = Image.open(PHOTO)
    others = detector.predict([PHOTO, PHOTO.read_bytes(), image, np.asarray(image)], "hazelnut")
    assert all(other.score == pytest.approx(expected.score, abs=1e-5) for other in others)
    assert all(other.regions[0].box == expected.regions[0].box for other in others)
    assert image.size == (expected.width, expected.height) == (384, 384)
    assert expected.map.shape == expected.mask.shape == (384, 384) and expected.map.dtype == np.float32
    assert expected.map.max() == pytest.approx(expected.regions[0].peak)
    assert expected.mask.sum() == sum(region.area for region in expected.regions)
    assert expected.defect == expected.regions[0].defect == "print"


def test_an_image_in_memory_is_turned_upright_and_left_as_it_is(detector: ZeroShotDetector) -> None:
    wide = Image.open(PHOTO).crop((0, 100, 384, 300))
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    wide.save(buffer, "PNG", exif=exif)
    image = Image.open(buffer)
    found = detector.predict(image, "hazelnut")
    assert (found.width, found.height) == (200, 384) and image.size == (384, 200)
    assert same(found, detector.predict(buffer.getvalue(), "hazelnut"))
    assert same(found, detector.predict(wide.transpose(Image.Transpose.ROTATE_270), "hazelnut"))


def test_grey_photos_are_photos(detector: ZeroShotDetector) -> None:
    grey = np.asarray(Image.open(PHOTO).convert("L"))
    assert same(detector.predict(grey, "hazelnut"), detector.predict(np.stack([grey] * 3, axis=2), "hazelnut"))


def deep_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_deep_photos_have_one_depth_a_class(detector: ZeroShotDetector, tmp_path: Path) -> None:
    """12 bits of the same photo score as its 8 bits; a dark one alone would be taken for 10 bits."""
    grey = np.asarray(Image.open(PHOTO).convert("L"))
    bright = (grey.astype(np.uint16) << 4) | (grey >> 4)
    dark = bright // 5
    assert dark.max() < 1024 <= bright.max()
    (tmp_path / "bright.png").write_bytes(deep_png(bright))
    plain = detector.predict(np.round(dark / 4095 * 255).astype(np.uint8), "hazelnut")
    (alone,) = detector.predict([deep_png(dark)], "hazel nut")
    assert (alone.bit_depth, alone.clipped) == (10, 0)
    for number, photo in enumerate((deep_png(dark), Image.fromarray(dark))):
        first, second = detector.predict([photo, tmp_path / "bright.png"], f"class {number}")
        assert (first.bit_depth, second.bit_depth) == (12, 12)
        assert first.grid == pytest.approx(
            detector.predict(np.round(dark / 4095 * 255).astype(np.uint8), f"class {number}").grid, abs=0.02
        )
        assert detector.predict(photo, f"class {number}").grid == pytest.approx(first.grid, abs=1e-4)
    assert (plain.bit_depth, plain.clipped) == (8, 0)
    late = detector.predict(deep_png(bright), "hazel nut")
    assert (late.bit_depth, late.clipped) == (10, int((bright > 1023).sum()))
    fixed = ZeroShotDetector.from_pretrained(device="cpu", bit_depth=12)
    assert fixed.predict(deep_png(dark), "hazel nut").bit_depth == 12


def test_large_photos_are_scored_in_tiles() -> None:
    image = Image.open(PHOTO).resize((900, 600))
    tiled = ZeroShotDetector.from_pretrained(device="cpu", method=Method.model_validate({"tile": {"size": 300}}))
    found = tiled.predict(image, "hazelnut")
    assert found.grid.shape == (32, 48) and found.map.shape == (600, 900)


def test_callers_may_bring_their_prompts_and_threshold() -> None:
    detector = ZeroShotDetector.from_pretrained(device="cpu", threshold=0.0)
    base = PromptSet(class_name="hazelnut", source="base", recipe="x", created_at=datetime.now(timezone.utc))
    bundled, plain = detector.predict(PHOTO, "hazelnut"), detector.predict(PHOTO, "hazelnut", base)
    assert plain.score != bundled.score and plain.mask.all() and plain.defect is None
    own = (
        Prompt(text="a flawless nut", side="normal", source="base"),
        Prompt(text="a nut with a red print", side="anomalous", source="base", defect="red print"),
    )
    ensemble = PromptEnsemble(class_name="hazelnut", source="base", fingerprint="own", prompts=own)
    found = detector.predict(PHOTO, "hazelnut", ensemble)
    assert found.defect == "red print" and [evidence.prompt for evidence in found.explanation] == [own[1].text]


def test_what_cannot_be_scored_is_an_error_that_names_it(detector: ZeroShotDetector, tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("no photo")
    with pytest.raises(ImageError, match=r"notes\.jpg: its bytes are no JPEG"):
        detector.predict([PHOTO, tmp_path / "notes.jpg"], "hazelnut")
    with pytest.raises(FileNotFoundError, match="gone"):
        detector.predict(tmp_path / "gone.jpg", "hazelnut")
    for pixels in (np.zeros((8, 8, 3)), np.zeros((8, 8, 2), np.uint8), np.zeros(8, np.uint8)):
        with pytest.raises(ValueError, match=r"uint8, \[height, width, 3\].*these are"):
            detector.predict(pixels, "hazelnut")  # type: ignore[type-var]
    assert detector.predict([], "hazelnut") == []


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(JobError, match="pretrained is required for ViT-B-16"):
        ZeroShotDetector.from_pretrained("ViT-B-16")
    with pytest.raises(ModelError, match="multiple of the patch size"):
        ZeroShotDetector.from_pretrained(image_size=225)
