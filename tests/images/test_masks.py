import io
from dataclasses import astuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from pipeline.images import Mask, draw_mask, encode_empty_mask, encode_map, encode_mask, find_regions, masks, upsample

NO_DEFECTS = np.zeros((0, 2, 2), dtype=np.float32)


def mask_of(anomaly_map: NDArray[np.float32], threshold: float = 0.5) -> Mask:
    """The mask of a map that has the image's size, so that upsampling changes nothing."""
    return draw_mask(anomaly_map, anomaly_map.shape[1], anomaly_map.shape[0], threshold)


@pytest.mark.parametrize("size", [(1500, 1000), (31, 17), (240, 240), (9, 1)])
def test_upsampling_is_bilinear_with_pixel_centres(size: tuple[int, int]) -> None:
    width, height = size
    grid = np.random.default_rng(0).random((15, 13), dtype=np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(grid)[None, None], (height, width), mode="bilinear")
    anomaly_map = upsample(grid, width, height)
    np.testing.assert_allclose(anomaly_map, expected[0, 0].numpy(), atol=2e-6)
    assert anomaly_map.max() <= grid.max() and anomaly_map.min() >= grid.min()


@pytest.mark.parametrize("size", [(1500, 1000), (31, 17), (240, 240), (9, 1), (1, 9), (2000, 130)])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, 0.7, float(np.float32(0.7)), 0.999])
def test_a_mask_is_the_upsampled_map_from_the_threshold_on(size: tuple[int, int], threshold: float) -> None:
    grid = np.random.default_rng(0).random((15, 13), dtype=np.float32)
    grid[3:9] *= 0.1
    grid[:, 5:7] *= 0.1
    anomaly_map = upsample(grid, *size)
    mask = draw_mask(grid, *size, threshold)
    expected = anomaly_map >= threshold
    np.testing.assert_array_equal(mask.lines[:, 1:], expected * np.uint8(255))
    assert not mask.lines[:, 0].any() and mask.shape == expected.shape
    assert mask.share == pytest.approx(expected.mean())
    peaks = {region.peak for region in find_regions(mask, [], NO_DEFECTS)}
    labels, count = ndimage.label(expected, structure=np.ones((3, 3)))
    assert peaks == {float(anomaly_map[labels == number].max()) for number in range(1, count + 1)}


def test_a_patch_comes_back_at_its_place_in_an_oblong_image() -> None:
    grid = np.zeros((15, 15), dtype=np.float32)
    grid[2, 12] = 1.0
    row, column = np.unravel_index(np.argmax(upsample(grid, 1500, 1000)), (1000, 1500))
    assert abs(row + 0.5 - 2.5 * 1000 / 15) <= 0.5 and abs(column + 0.5 - 12.5 * 1500 / 15) <= 0.5


def test_regions_have_boxes_areas_and_peaks_and_touch_at_corners() -> None:
    anomaly_map = np.array([[0.9, 0, 0, 0], [0, 0.8, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.95]], dtype=np.float32)
    first, second = find_regions(mask_of(anomaly_map), [], NO_DEFECTS)
    assert (first.x, first.y, first.width, first.height, first.area) == (3, 3, 1, 1, 1)
    assert (second.x, second.y, second.width, second.height, second.area) == (0, 0, 2, 2, 2)
    assert (first.peak, second.peak) == (pytest.approx(0.95), pytest.approx(0.9))
    assert first.defect is None


def test_a_region_is_named_after_the_defect_nearest_to_its_patches() -> None:
    anomaly_map = np.zeros((4, 8), dtype=np.float32)
    anomaly_map[0:2, 4:8] = 1.0  # all of patch (0, 1) of a 2 x 2 grid
    grid = np.array([[[0.9, 0.1], [0.9, 0.9]], [[0.1, 0.2], [0.1, 0.1]]], dtype=np.float32)
    (region,) = find_regions(mask_of(anomaly_map), ["scratch", "dent"], grid)
    assert region.defect == "dent"


def test_the_peer_of_a_region_is_the_one_nearest_on_most_of_its_pixels() -> None:
    anomaly_map = np.zeros((4, 8), dtype=np.float32)
    anomaly_map[1:4, 0:5] = 1.0  # 3 x 4 pixels in the left patch of 1 x 2, 3 x 1 in the right one
    peers = ["a.png", "b.png", "c.png"]
    (region,) = find_regions(mask_of(anomaly_map), [], NO_DEFECTS, peers, np.array([[2, 0]], dtype=np.int16))
    assert region.peer_uri == "c.png"
    assert find_regions(mask_of(anomaly_map), [], NO_DEFECTS)[0].peer_uri is None


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("width", "height"), [(60, 41), (7, 90), (1, 30), (30, 1)])
def test_regions_are_those_of_a_labelling_pixel_by_pixel(width: int, height: int, seed: int) -> None:
    """Speckles, half of the pixels set, where every way of touching occurs; a 5 x 4 grid that divides no side."""
    chance = np.random.default_rng(seed)
    anomaly_map = chance.random((height, width), dtype=np.float32)
    mask, names = mask_of(anomaly_map, 0.3 + seed / 6), ["scratch", "dent", "crack"]
    defect_grid = chance.random((3, 5, 4), dtype=np.float32)
    labels, count = ndimage.label(mask.lines[:, 1:], structure=np.ones((3, 3)))
    rows, columns = np.indices(mask.shape)
    expected = set()
    for number in range(1, count + 1):
        y, x = np.nonzero(labels == number)
        cosines = defect_grid[:, rows[y, x] * 5 // height, columns[y, x] * 4 // width].sum(axis=1, dtype=np.float64)
        box = x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1
        expected.add((*map(int, box), len(x), float(anomaly_map[y, x].max()), names[int(np.argmax(cosines))]))
    found = find_regions(mask, names, defect_grid)
    assert len(found) == count and {astuple(region)[:-1] for region in found} == expected
    assert [region.peak for region in found] == sorted((region.peak for region in found), reverse=True)


def test_an_empty_mask_has_no_region() -> None:
    assert find_regions(mask_of(np.zeros((4, 4), dtype=np.float32)), ["scratch"], np.zeros((1, 2, 2), np.float32)) == []


@pytest.mark.parametrize("fast", [True, False])
def test_masks_decode_to_0_and_255(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ISA-L and without it."""
    assert masks.isal_zlib is not None
    if not fast:
        monkeypatch.setattr(masks, "isal_zlib", None)
    encode_empty_mask.cache_clear()
    mask = np.array([[1, 0, 0], [0, 1, 1]], dtype=np.float32)
    image = Image.open(io.BytesIO(encode_mask(mask_of(mask))))
    assert (image.mode, image.size) == ("L", (3, 2))
    np.testing.assert_array_equal(np.asarray(image), mask * 255)
    empty = Image.open(io.BytesIO(encode_empty_mask(3, 2)))
    assert (empty.mode, empty.size, empty.getextrema()) == ("L", (3, 2), (0, 0))
    noise = np.random.default_rng(0).random((300, 400), dtype=np.float32)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_mask(mask_of(noise))))), (noise >= 0.5) * 255)


def test_maps_decode_to_probabilities() -> None:
    anomaly_map = np.array([[0.0, 0.25, 1.0]], dtype=np.float32)
    image = Image.open(io.BytesIO(encode_map(anomaly_map)))
    assert image.mode == "I;16"
    np.testing.assert_allclose(np.asarray(image) / 65535, anomaly_map, atol=1 / 65535)
