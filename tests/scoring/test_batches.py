import numpy as np
import pytest

from pipeline.images import resize_by_pillow
from pipeline.scoring.batches import resize_by_torch

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("shape", [(1, 1), (48, 32), (500, 333), (31, 900), (20, 11)])
def test_torch_resizes_as_pillow_does(shape: tuple[int, int], channels: int, interpolation: str) -> None:
    pixels = RANDOM.integers(0, 256, (*shape, channels), dtype=np.uint8)
    pixels.flags.writeable = False  # as those that come from Pillow
    ours, pillows = (resize(pixels, (48, 32), interpolation) for resize in (resize_by_torch, resize_by_pillow))
    assert ours.shape == (48, 32, channels) and ours.dtype == np.uint8 and ours.flags.c_contiguous
    apart = np.abs(ours.astype(int) - pillows)
    most = 2 if min(shape) < 32 else 1  # where pixels are magnified, weights are rounded more coarsely
    assert apart.max() <= most and (apart > 0).mean() < 0.02
