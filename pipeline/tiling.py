"""Where the tiles of a large photo lie. Tiles sit on one grid of patches, so that what is found in them can be added
patch by patch, without resampling."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiling:
    """Tiles over a photo, in patches.

    grid: rows and columns of patches of the whole photo; tile: those of a tile; places: top and left patch of each
    tile, row by row.
    """

    grid: tuple[int, int]
    tile: tuple[int, int]
    places: tuple[tuple[int, int], ...]

    def boxes(self, width: int, height: int) -> list[tuple[float, float, float, float]]:
        """Left, top, right and bottom of each tile, in pixels of a photo of this size, which need not be whole."""
        y, x = height / self.grid[0], width / self.grid[1]
        rows, columns = self.tile
        return [
            (left * x, top * y, min((left + columns) * x, width), min((top + rows) * y, height))
            for top, left in self.places
        ]


def plan_tiling(width: int, height: int, tile: tuple[int, int], size: int, overlap: int) -> Tiling:
    """Tiles of about `size` pixels a side that overlap by at least `overlap`, evenly spread over a photo.

    tile: rows and columns of patches that the model sees in one. A side that is shorter than a tile is covered by one.
    """
    (rows, tops), (columns, lefts) = (
        _plan_axis(length, patches, size, overlap) for length, patches in zip((height, width), tile, strict=True)
    )
    return Tiling((rows, columns), tile, tuple((top, left) for top in tops for left in lefts))


def _plan_axis(length: int, patches: int, size: int, overlap: int) -> tuple[int, list[int]]:
    """Patches along an axis, and where tiles begin."""
    total = max(patches, round(length * patches / size))
    shared = min(patches - 1, -(-overlap * patches // size))
    count = 1 if total == patches else -(-(total - shared) // (patches - shared))
    return total, [round(number * (total - patches) / max(1, count - 1)) for number in range(count)]
