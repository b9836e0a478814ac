import numpy as np
import pytest
from PIL import Image

from pipeline.images.resizing import INTERPOLATIONS, resize, to_image, view_pixels

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
@pytest.mark.parametrize("shape", [(1, 1), (48, 32), (500, 333), (31, 900), (20, 11)])
def test_pixels_are_resized_as_pillow_does(shape: tuple[int, int], mode: str, interpolation: str) -> None:
    pixels = RANDOM.integers(0, 256, (*shape, len(mode)), dtype=np.uint8)
    pixels.flags.writeable = False  # as those that come from Pillow
    ours = resize(pixels, (48, 32), interpolation)
    pillows = np.asarray(to_image(pixels, mode).resize((32, 48), INTERPOLATIONS[interpolation]))
    assert ours.shape == (48, 32, len(mode)) and ours.dtype == np.uint8
    apart = np.abs(ours.astype(int) - pillows)
    most = 2 if min(shape) < 32 else 1  # where pixels are magnified, weights are rounded more coarsely
    assert apart.max() <= most and (apart > 0).mean() < 0.02


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
@pytest.mark.parametrize("size", [(3, 2), (2500, 2000)])
def test_pixels_of_an_image_are_seen_without_a_copy(size: tuple[int, int], mode: str) -> None:
    """The larger image would be in two pieces if Pillow had its own limit of 16 MB a piece."""
    image = Image.fromarray(RANDOM.integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8), mode)
    pixels = view_pixels(image)
    assert pixels.shape == (size[1], size[0], 4) and not pixels.flags.owndata
    np.testing.assert_array_equal(pixels[..., : len(mode)], np.asarray(image))
    np.testing.assert_array_equal(np.asarray(to_image(pixels, mode)), np.asarray(image))
