"""Tiles of large photos: their places, by hand and for all sizes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tiling import plan_strip, plan_tiling
from schemas.job import JobError, parse_job


def test_places_by_hand() -> None:
    """4,000 pixels of 500 a tile of 15 patches are 120 patches; 100 pixels are 3 patches, so 10 tiles start 11.7 apart;
    3,000 pixels are 90, so 8 tiles."""
    tiling = plan_tiling(4000, 3000, (15, 15), 500, 100)
    assert tiling.grid == (90, 120)
    assert [left for top, left in tiling.places if top == 0] == [0, 12, 23, 35, 47, 58, 70, 82, 93, 105]
    assert sorted({top for top, _ in tiling.places}) == [0, 11, 21, 32, 43, 54, 64, 75]
    boxes = tiling.boxes(4000, 3000)
    assert (boxes[0], boxes[-1]) == (pytest.approx((0, 0, 500, 500)), pytest.approx((3500, 2500, 4000, 3000)))


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 9000), st.integers(1, 9000), st.tuples(st.integers(1, 37), st.integers(1, 37)),
    st.integers(64, 2000), st.floats(0, 0.5),
)  # fmt: skip
def test_tiles_cover_every_patch_within_the_photo(
    width: int, height: int, tile: tuple[int, int], size: int, share: float
) -> None:
    tiling = plan_tiling(width, height, tile, size, int(size * share))
    rows, columns = (np.zeros(side, dtype=int) for side in tiling.grid)
    for top in {top for top, _ in tiling.places}:
        rows[top : top + tile[0]] += 1
    for left in {left for _, left in tiling.places}:
        columns[left : left + tile[1]] += 1
    assert rows.min() >= 1 and columns.min() >= 1
    for left, top, right, bottom in tiling.boxes(width, height):
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
    lefts = sorted({left for _, left in tiling.places})
    for one, two in pairwise(lefts):
        assert 1 <= two - one <= tile[1] - min(int(size * share) * tile[1] // size, tile[1] - 1)


def test_an_overlap_of_more_than_half_is_refused() -> None:
    document = {"dataset": {"images": "x"}, "output": {"uri": "y"}}
    with pytest.raises(JobError, match=r"method.tile: overlap must be at most half of size \(250\)"):
        parse_job(document, ["method.tile.size=500", "method.tile.overlap=251"])


def test_strips_by_hand() -> None:
    """Tiles of 14 patches overlap by 4. 1,120 pixels are 70 patches of 16 pixels where a tile has 224; 16 tiles reach
    over 164 patches, so 30,000 pixels have tiles of 30,000 x 14 / 164 = 2,561 pixels."""
    assert plan_strip(896, 224, (14, 14), 224) is None  # 4:1 is no strip
    assert plan_strip(4000, 55, (14, 14), 224) is None  # too thin
    assert plan_strip(512, 1, (14, 14), 224) is None
    tiling = plan_strip(1120, 100, (14, 14), 224)
    assert tiling is not None and tiling.grid == (14, 70)
    assert [left for _, left in tiling.places] == [0, 9, 19, 28, 37, 47, 56]
    upright = plan_strip(64, 30_000, (14, 14), 224)
    assert upright is not None and upright.grid == (164, 14) and len(upright.places) == 16


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 500), st.integers(1, 200_000), st.integers(1, 37), st.integers(32, 700))
def test_strips_have_16_tiles_at_most(width: int, height: int, patches: int, view: int) -> None:
    tiling = plan_strip(width, height, (patches, patches), view)
    assert (tiling is not None) == (
        max(width, height) > 4 * max(min(width, height), view) and 4 * min(width, height) >= view
    )
    assert tiling is None or 4 <= len(tiling.places) <= 16
