"""Line-scan strips, which are much longer than wide: scored in tiles, and so said in their rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.images import Cut, Isolation, decode_image
from pipeline.prompts import compose_ensemble, make_offline
from pipeline.scoring import View, detect, image_decoder
from tests.images.hostile import encode
from tests.places import DEMO
from tests.scoring.runs import job_for, load_detector, score

NUT = DEMO / "hazelnut/test/good/01.jpg"
DEFECT = 20


def strip(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A brushed surface: noise of four sizes, of one hue."""
    rng = np.random.default_rng(seed)
    noise = np.zeros((height, width), np.float32)
    for size in (1, 4, 16, 64):
        coarse = rng.normal(0, 8, (-(-height // size), -(-width // size))).astype(np.float32)
        noise += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return (np.array([150, 140, 125]) + noise[..., None]).clip(0, 255).astype(np.uint8)


def pair(height: int, width: int, left: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A strip, and the same with a dark square of 20 pixels in the middle of its height."""
    clean = strip(height, width)
    marked, top = clean.astype(int), (height - DEFECT) // 2
    marked[top : top + DEFECT, left : left + DEFECT] -= 80
    return clean, marked.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Rows of a night by image key; strips and other photos are in one batch."""
    folder = tmp_path_factory.mktemp("strips")
    photos = dict(zip(("clean", "defect"), pair(64, 4000, 3000), strict=True))
    photos |= {"upright": photos["defect"].transpose(1, 0, 2), "line": strip(1, 512), "square": strip(300, 300)}
    (folder / "in/steel").mkdir(parents=True)
    for name, pixels in photos.items():
        Image.fromarray(pixels).save(folder / f"in/steel/{name}.png")
    (folder / "in/steel/nut.jpg").write_bytes(NUT.read_bytes())
    (folder / "in/steel/void.png").write_bytes(b"")
    (folder / "nut/steel").mkdir(parents=True)
    (folder / "nut/steel/nut.jpg").write_bytes(NUT.read_bytes())
    job = job_for(folder / "in", folder / "out", "model.device=cpu", "output.maps=true")
    detector = load_detector(job)
    found: dict[str, Any] = {Path(str(row["image_key"])).stem: row for row in score(detector, job, "steel")}
    (found["alone"],) = score(detector, job_for(folder / "nut", folder / "out2", "model.device=cpu"), "steel")
    return found


def test_rows_say_in_how_many_tiles_a_photo_was_scored(rows: dict[str, dict[str, Any]]) -> None:
    """4,000 pixels in tiles of 16 patches that overlap by 4: 16 tiles are 196 patches of at least 327 / 16 pixels."""
    found = {name: row["tiles"] for name, row in rows.items()}
    assert found.pop("void") is None
    assert found == {"clean": 16, "defect": 16, "upright": 16, "line": 1, "square": 1, "nut": 1, "alone": 1}


def test_photos_that_share_a_batch_with_strips_keep_their_scores(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["nut"]["score"] == pytest.approx(rows["alone"]["score"], abs=1e-4)
    np.testing.assert_allclose(rows["nut"]["grid"], rows["alone"]["grid"], atol=1e-4)


def test_maps_and_masks_of_strips_lie_as_the_photo_does(rows: dict[str, dict[str, Any]]) -> None:
    for name, size, grid in (("defect", (4000, 64), (16, 196)), ("upright", (64, 4000), (196, 16))):
        row = rows[name]
        assert (row["width"], row["height"]) == size and np.reshape(row["grid"], (-1, row["grid_width"])).shape == grid
        for uri in (row["map_uri"], row["mask_uri"]):
            with Image.open(uri) as image:
                assert image.size == size
    row = rows["defect"]
    assert row["score"] > rows["clean"]["score"]
    place = np.reshape(row["grid"], (-1, 196)).max(0).argmax()
    assert abs((place + 0.5) * 4000 / 196 - 3010) < 2 * 4000 / 196  # two patches


def test_a_strip_of_30_000_pixels_shows_in_tiles_what_it_hides_as_a_whole() -> None:
    """Squashed to 224 pixels, the defect would be a seventh of a pixel long."""
    job = job_for(DEMO, DEMO, "model.device=cpu")
    detector = load_detector(job)
    prompts = detector.embed(compose_ensemble(make_offline("steel"), lambda _: True))
    decode = image_decoder(job, detector)
    clean, defect = (decode(encode(Image.fromarray(pixels), "PNG")) for pixels in pair(64, 30_000, 21_000))
    assert clean.tiling is not None and (clean.tiling.grid, len(clean.tiling.places)) == ((16, 196), 16)
    raised = []
    for images in ((clean, defect), (replace(clean, tiles=None), replace(defect, tiles=None))):
        before, after = detect(detector, images, [prompts] * 2, job)
        raised.append(after.grid - before.grid)
    tiled, whole = raised
    assert tiled.max() > 0.1 > 10 * whole.max()
    assert abs((tiled.max(0).argmax() + 0.5) * 30_000 / 196 - 21_010) < 2 * 30_000 / 196


def test_jpeg_strips_are_cut_at_a_reduced_size_as_in_full() -> None:
    image = Image.fromarray(strip(40, 320)).resize((10_240, 1280), Image.Resampling.BICUBIC)
    options: dict[str, Any] = {"size": (64, 64), "interpolation": "bicubic", "max_pixels": 20_000_000}
    jpeg, png = encode(image, "JPEG", quality=95, subsampling=0), encode(image, "PNG")
    reduced, full = (decode_image(data, **options, cut=Cut((4, 4))) for data in (jpeg, png))
    assert reduced.tiles is not None and full.tiles is not None
    assert (reduced.source_width, reduced.source_height, reduced.tiling) == (10_240, 1280, full.tiling)
    assert np.abs(reduced.tiles.astype(int) - full.tiles).mean() < 2


def test_a_process_of_its_own_cuts_strips_alike() -> None:
    job = job_for(DEMO, DEMO, "model.device=cpu")
    detector = load_detector(job)
    options, data = View.of(detector).options(job), encode(Image.fromarray(strip(64, 2000)), "PNG")
    with Isolation() as isolated:
        here, alone = decode_image(data, **options), isolated.decode(data, **options)
        assert isolated.decode(encode(Image.fromarray(strip(64, 64)), "PNG"), **options).tiles is None
    assert here.tiling == alone.tiling and here.tiling is not None
    np.testing.assert_array_equal(here.tiles, alone.tiles)
    np.testing.assert_array_equal(here.pixels, alone.pixels)
