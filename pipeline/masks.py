"""Anomaly map on the patch grid -> map of the image's size -> mask, regions, PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=np.int8)


@dataclass(frozen=True)
class Region:
    """A connected region of a mask: box and area in pixels of the source image, highest map value, nearest defect."""

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float
    defect: str | None


def upsample(grid: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
    """Bilinear from the patch grid [gh, gw] to the image [height, width] (pixel centres, edges held)."""
    image = Image.fromarray(np.ascontiguousarray(grid, dtype=np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def find_regions(
    mask: NDArray[np.bool_],
    anomaly_map: NDArray[np.float32],
    defect_names: Sequence[str],
    defect_grid: NDArray[np.float32],
) -> list[Region]:
    """Regions (8 neighbours) of a mask [h, w], highest peak first.

    The defect of a region is the one whose prompts are nearest to the region's mean local embedding: cosines with the
    defects, defect_grid [K, gh, gw], are averaged over the region's pixels, which ranks them alike (the mean is linear
    and its length is common to all defects). None where no defect is described.
    """
    labels, _ = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)
    regions = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[box] == number
        rows, columns = box
        regions.append(
            Region(
                x=columns.start,
                y=rows.start,
                width=columns.stop - columns.start,
                height=rows.stop - rows.start,
                area=int(inside.sum()),
                peak=float(anomaly_map[box][inside].max()),
                defect=_nearest_defect(inside, box, mask.shape, defect_names, defect_grid),
            )
        )
    return sorted(regions, key=lambda region: (-region.peak, region.y, region.x))


def split_regions(
    mask: NDArray[np.bool_], regions: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], NDArray[np.bool_]]]:
    """Each of a row's regions with its own part of the mask [h, w]: parts are disjoint, and their union is the mask.

    regions: as find_regions gave them; a region is known by its box and area.
    """
    labels, _ = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)
    numbers: dict[tuple[int, ...], list[int]] = {}
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        area = int((labels[rows, columns] == number).sum())
        box = (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start, area)
        numbers.setdefault(box, []).append(number)
    for region in regions:
        box = tuple(region[key] for key in ("x", "y", "width", "height", "area"))
        yield region, labels == numbers[box].pop()


def encode_mask(mask: NDArray[np.bool_]) -> bytes:
    """8-bit greyscale PNG, 255 where the mask is set, else 0."""
    return _png(Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))))


def encode_map(anomaly_map: NDArray[np.float32]) -> bytes:
    """16-bit greyscale PNG; value / 65535 is the map, cut at 1 (with references it may go beyond)."""
    return _png(Image.fromarray(np.rint(np.clip(anomaly_map, 0.0, 1.0) * 65535).astype(np.uint16)))


def _nearest_defect(
    inside: NDArray[np.bool_],
    box: tuple[slice, ...],
    shape: tuple[int, ...],
    names: Sequence[str],
    grid: NDArray[np.float32],
) -> str | None:
    if not names:
        return None
    patch_rows, first_rows = _patches(box[0], shape[0], grid.shape[1])
    patch_columns, first_columns = _patches(box[1], shape[1], grid.shape[2])
    by_row = np.add.reduceat(inside, first_rows, axis=0, dtype=np.int64)
    pixels = np.add.reduceat(by_row, first_columns, axis=1)
    similarity = np.einsum("krc,rc->k", grid[:, patch_rows][:, :, patch_columns], pixels)
    return names[int(np.argmax(similarity))]


def _patches(span: slice, length: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The patches that pixels of one axis lie in, and where in the span each begins."""
    return np.unique(np.arange(span.start, span.stop) * count // length, return_index=True)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
