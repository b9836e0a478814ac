"""Plans the tiles of a large photo. All tiles lie on one grid of patches, so that their maps can be added patch by
patch, without resampling."""

from __future__ import annotations

from dataclasses import dataclass

_STRIP = 4
_MOST_STRIP_TILES = 16


@dataclass(frozen=True)
class Tiling:
    """The tiles of a photo, measured in patches.

    grid: rows and columns of the whole photo. tile: rows and columns of each tile. places: top row and left column of
    each tile, row by row.
    """

    grid: tuple[int, int]
    tile: tuple[int, int]
    places: tuple[tuple[int, int], ...]

    def boxes(self, width: int, height: int) -> list[tuple[float, float, float, float]]:
        """Returns left, top, right and bottom of each tile in pixels of a photo of this size; they may be fractions."""
        y, x = height / self.grid[0], width / self.grid[1]
        rows, columns = self.tile
        return [
            (left * x, top * y, min((left + columns) * x, width), min((top + rows) * y, height))
            for top, left in self.places
        ]


def plan_tiling(width: int, height: int, tile: tuple[int, int], size: int, overlap: int) -> Tiling:
    """Spreads tiles evenly over a photo. Each side has about `size` pixels; neighbours share at least `overlap`.

    tile: rows and columns of patches in the model's input. A side of the photo that is shorter than `size` gets one
    tile.
    """
    (rows, tops), (columns, lefts) = (
        _plan_axis(length, patches, size, overlap) for length, patches in zip((height, width), tile, strict=True)
    )
    return Tiling((rows, columns), tile, tuple((top, left) for top in tops for left in lefts))


def plan_strip(width: int, height: int, tile: tuple[int, int], view: int) -> Tiling | None:
    """Tiles along a strip, 16 at most, that overlap by a quarter; None for a photo that is no strip.

    A tile is as long as the strip is wide, but no shorter than `view`, the pixels a side that the model sees; what is
    longer than 16 such tiles has longer ones. A photo is a strip where it is longer than 4 such tiles, and its width
    is a quarter of `view` at least: tiles of a thinner one would be magnified so much that they look like defects.
    """
    shorter, longer = sorted((width, height))
    patches = tile[1] if width > height else tile[0]
    size = max(shorter, view)
    if longer <= _STRIP * size or shorter * _STRIP < view:
        return None
    shared = min(patches - 1, -(-patches // 4))
    most = _MOST_STRIP_TILES * (patches - shared) + shared
    size = max(size, -(-longer * patches // most))
    return plan_tiling(width, height, tile, size, size // 4)


def _plan_axis(length: int, patches: int, size: int, overlap: int) -> tuple[int, list[int]]:
    """Returns the number of patches along an axis, and the first patch of each tile."""
    total = max(patches, round(length * patches / size))
    shared = min(patches - 1, -(-overlap * patches // size))
    count = 1 if total == patches else -(-(total - shared) // (patches - shared))
    return total, [round(number * (total - patches) / max(1, count - 1)) for number in range(count)]
