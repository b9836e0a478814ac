"""Tiles of one large photo become one map."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.alfa import Detector, Encoder
from pipeline.alfa.detector import _mean_filter
from pipeline.tiling import Tiling, plan_tiling
from schemas.job import Method, References
from tests.alfa.conftest import ensemble, random_pixels

NUT = ensemble("nut", 4, ("crack", "hole"))


def test_a_tile_over_the_whole_photo_gives_what_the_whole_gives(encoder: Encoder) -> None:
    detector = Detector(encoder, Method(aligner="value"))
    prompts, pixels = detector.embed(NUT), random_pixels(1, (64, 64))
    tiling = plan_tiling(64, 64, encoder.grid, 64, 0)
    (plain,) = detector.detect(pixels, [prompts])
    (tiled,) = detector.start_tiled(pixels[0], pixels, tiling, prompts, 8)()
    for name in ("score", "score_global", "score_local", "grid", "defect_grid"):
        np.testing.assert_allclose(getattr(tiled, name), getattr(plain, name), atol=1e-6)
    assert tiled.explanation == plain.explanation


@pytest.mark.parametrize("at_once", [1, 2, 16])
def test_tiles_are_blended_as_a_slow_reference_does(encoder: Encoder, at_once: int) -> None:
    """Weights of 4 patches: 1 2 2 1 along each axis; the prompts are chosen by the whole, not by a tile."""
    detector = Detector(encoder, Method(aligner="raw"), References(images="train"))
    whole, *tiles = random_pixels(6, (64, 64))
    memory = detector.remember(random_pixels(2, (64, 64), seed=9).split(1))
    prompts = replace(detector.embed(NUT), memory=memory)
    tiling = Tiling((5, 9), (4, 4), ((0, 0), (1, 0), (0, 3), (0, 5), (1, 5)))
    (found,) = detector.start_tiled(whole, torch.stack(tiles), tiling, prompts, at_once)()
    adapted = detector._adapt_prompts(encoder.encode_images(whole[None], (3,)).embedding, [prompts])
    ramp = [1, 2, 2, 1]
    sums, weights = np.zeros((2, 5, 9)), np.zeros((5, 9))
    for pixels, (top, left) in zip(tiles, tiling.places, strict=True):
        features = detector.features(pixels[None])
        parts = detector._score_patches(features, adapted.sides, [prompts], features.fingerprints)[0, :2].view(2, 4, 4)
        for row in range(4):
            for column in range(4):
                weight = ramp[row] * ramp[column]
                sums[:, top + row, left + column] += weight * parts[:, row, column].numpy()
                weights[top + row, left + column] += weight
    seen = weights > 0
    language, distance = np.where(seen, sums / np.maximum(weights, 1), np.nan)
    assert seen[:4].all() and not seen[4, 4]
    smooth = _mean_filter(torch.from_numpy(language)[None, None].float())[0, 0].numpy() + distance
    np.testing.assert_allclose(found.grid[:3], smooth[:3], atol=1e-5)
    assert found.shots == 2


def test_a_large_defect_grid_is_averaged(encoder: Encoder) -> None:
    detector = Detector(encoder, Method(aligner="raw"))
    whole, tile = random_pixels(2, (64, 64))
    places = tuple((top, left) for top in range(0, 128, 4) for left in range(0, 4, 4))
    tiling = Tiling((128, 4), (4, 4), places)
    many, nut = tile.expand(len(places), -1, -1, -1), detector.embed(NUT)
    (found,) = detector.start_tiled(whole, many, tiling, nut, 16)()
    (one,) = detector.start_tiled(whole, tile[None], Tiling((4, 4), (4, 4), ((0, 0),)), nut, 16)()
    assert found.grid.shape == (128, 4) and found.defect_grid.shape == (2, 64, 4)
    expected = one.defect_grid.reshape(2, 2, 2, 4).mean(2)
    np.testing.assert_allclose(found.defect_grid[:, :2], expected, atol=1e-5)
    assert found.score_global == pytest.approx(one.score_global)
