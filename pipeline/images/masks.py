"""Turns an anomaly map on the patch grid into a map of the image's size, a mask, regions and PNG bytes."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, sparse
from scipy.sparse import csgraph

try:
    from isal import isal_zlib
except ImportError:  # it comes with the extra `fast`
    isal_zlib = None  # type: ignore[assignment]

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=np.int8)
_BAND = 32
"""Rows that are upsampled at a time, so that they stay in the cache of a core."""


@dataclass(frozen=True)
class Region:
    """A connected region of a mask.

    x, y, width, height, area: in pixels of the source image. peak: highest map value. defect: the best-fitting
    described defect. peer_uri: address of the peer that is most similar there.
    """

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float
    defect: str | None
    peer_uri: str | None = None

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in pixels; right and bottom are exclusive, as in Pillow's crop."""
        return self.x, self.y, self.x + self.width, self.y + self.height


def upsample(grid: NDArray[np.float32], width: int, height: int, least: float | None = None) -> NDArray[np.float32]:
    """Upsamples a map bilinearly from the patch grid [gh, gw] to the image [height, width] (pixel centres, edges held).

    Values are never above the highest patch or below the lowest. least: rows between patches that are all below this
    value are set to minus infinity; that saves most of the time if only a mask is needed.

    Rows are made in bands, so that there is only one array of the image's size: getting memory for more from the system
    takes longer than the arithmetic.
    """
    rows, weights = _blend(height, grid.shape[0])
    columns, shares = _blend(width, grid.shape[1])
    held = np.pad(grid.astype(np.float64), ((0, 1), (0, 1)), mode="edge")
    lines = held[:, columns] + shares * (held[:, columns + 1] - held[:, columns])
    lines = lines.astype(np.float32).astype(np.float64)
    steps, peaks = np.diff(lines, axis=0), lines.max(axis=1)
    wanted = np.maximum(peaks[:-1], peaks[1:]) >= (-np.inf if least is None else np.float32(least))
    result = np.empty((height, width), dtype=np.float32)
    scratch = np.empty((_BAND, width))
    start = 0
    while start < height:
        row = rows[start]
        stop = min(start + _BAND, int(np.searchsorted(rows, row, side="right")))
        if wanted[row]:
            band = np.multiply(weights[start:stop, None], steps[row], out=scratch[: stop - start])
            band += lines[row]
            result[start:stop] = band
        else:
            result[start:stop] = -np.inf
        start = stop
    return result


def _blend(length: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns, for each pixel of an axis, the patch whose centre is before it, and the weight of the next patch."""
    place: NDArray[np.float64] = ((np.arange(length) + 0.5) * count / length - 0.5).clip(0, count - 1)
    before = place.astype(np.int64)
    return before, place - before


def find_regions(
    mask: NDArray[np.bool_],
    anomaly_map: NDArray[np.float32],
    defect_names: Sequence[str],
    defect_grid: NDArray[np.float32],
    peer_uris: Sequence[str] = (),
    peer_grid: NDArray[np.int16] | None = None,
) -> list[Region]:
    """Finds the regions (8 neighbours) of a mask [h, w], the highest peak first.

    The defect of a region is the one whose prompts are nearest to the mean local embedding of the region; None if no
    defect is described. It has the highest mean cosine over the region's pixels, because the mean is linear and its
    length is common to all defects. The peer of a region is the one that is nearest on most of its pixels.

    defect_grid: cosines of each patch with the K defects, [K, gh, gw]. peer_grid: for each patch the index in peer_uris
    of its nearest peer, [gh, gw].
    """
    runs = _find_runs(mask)
    if not len(runs.row):
        return []
    # reduceat also gives an entry for each gap between two runs, even an empty one; [::2] drops those.
    edges = np.stack([runs.row * mask.shape[1] + edge for edge in (runs.start, runs.stop)], axis=1).ravel()
    peaks = np.maximum.reduceat(anomaly_map.ravel(), edges[: -1 if edges[-1] == mask.size else None])[::2]
    labels = _label_runs(runs, mask.shape[1])
    order = np.argsort(labels, kind="stable")
    regions = []
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        region = _Runs(runs.row[members], runs.start[members], runs.stop[members])
        x, y = int(region.start.min()), int(region.row[0])
        regions.append(
            Region(
                x=x,
                y=y,
                width=int(region.stop.max()) - x,
                height=int(region.row[-1]) + 1 - y,
                area=int((region.stop - region.start).sum()),
                peak=float(peaks[members].max()),
                defect=_nearest_defect(region, mask.shape, defect_names, defect_grid),
                peer_uri=_nearest_peer(region, mask.shape, peer_uris, peer_grid),
            )
        )
    return sorted(regions, key=lambda region: (-region.peak, region.y, region.x))


def split_regions(
    mask: NDArray[np.bool_], regions: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], NDArray[np.bool_]]]:
    """Yields each region with its part of the mask [h, w]. The parts are disjoint, and their union is the mask.

    regions: those of a row, from find_regions; they are matched by box and area.
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
    """Encodes a mask [h, w] as an 8-bit greyscale PNG: 255 where it is set, else 0.

    Lines are not filtered. Pillow has no option for that; it takes twice the time, and three times the bytes.
    """
    height, width = mask.shape
    lines = np.zeros((height, 1 + width), dtype=np.uint8)  # the first byte of a line is its filter; 0 means none
    np.negative(mask, out=lines[:, 1:], casting="unsafe", dtype=np.uint8)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", _deflate(lines.data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in chunks
    )


def _deflate(data: memoryview) -> bytes:
    """Compresses the lines of a mask: with ISA-L if it is installed, in a tenth of zlib's time, for 20 % more bytes.

    zlib compresses only runs of equal bytes, which takes as long as its level 1, for a third of the bytes.
    """
    if isal_zlib is not None:
        compressed: bytes = isal_zlib.compress(data, 1)
        return compressed
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    return packer.compress(data) + packer.flush()


@functools.lru_cache(maxsize=64)
def encode_empty_mask(width: int, height: int) -> bytes:
    """Encodes a mask without set pixels. It is cached, because most masks of a night are empty and of few sizes."""
    return encode_mask(np.zeros((height, width), dtype=np.bool_))


def encode_map(anomaly_map: NDArray[np.float32]) -> bytes:
    """Encodes a map as a 16-bit greyscale PNG. value / 65535 is the map, cut at 1 (with references it may exceed 1)."""
    return _png(Image.fromarray(np.rint(np.clip(anomaly_map, 0.0, 1.0) * 65535).astype(np.uint16)))


@dataclass(frozen=True)
class _Runs:
    """Runs of set pixels, row by row, int64 [N] each. row; start: first column; stop: the column after the last."""

    row: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]


def _find_runs(mask: NDArray[np.bool_]) -> _Runs:
    height, width = mask.shape
    pixels = np.zeros(1 + height * (width + 1), dtype=np.bool_)  # with an unset pixel before all, and after each row
    pixels[1:].reshape(height, width + 1)[:, :width] = mask
    edges = np.flatnonzero(pixels[1:] != pixels[:-1])
    row, start = np.divmod(edges[::2], width + 1)
    return _Runs(row, start, edges[1::2] - row * (width + 1))


def _label_runs(runs: _Runs, width: int) -> NDArray[np.int32]:
    """Returns the region of each run, [N].

    Runs of neighbouring rows belong together if their sides or corners touch.
    """
    starts, stops = (runs.row * (width + 1) + edge for edge in (runs.start, runs.stop))
    first = np.searchsorted(stops, starts + width + 1, side="left")
    count = np.searchsorted(starts, stops + width + 1, side="right") - first
    above = np.repeat(np.arange(len(starts)), count)
    below = np.arange(len(above)) + np.repeat(first - np.cumsum(count) + count, count)
    touching = sparse.coo_array((np.ones(len(above), dtype=np.int8), (above, below)), shape=(len(starts),) * 2)
    labels: NDArray[np.int32] = csgraph.connected_components(touching, directed=False)[1]
    return labels


def _nearest_defect(runs: _Runs, shape: tuple[int, ...], names: Sequence[str], grid: NDArray[np.float32]) -> str | None:
    if not names:
        return None
    pixels = _count_in_patches(runs, shape, grid.shape[1:])
    return names[int(np.argmax(np.einsum("krc,rc->k", grid, pixels)))]


def _nearest_peer(
    runs: _Runs, shape: tuple[int, ...], uris: Sequence[str], grid: NDArray[np.int16] | None
) -> str | None:
    if grid is None or not uris:
        return None
    pixels = _count_in_patches(runs, shape, grid.shape)
    return uris[int(np.bincount(grid.ravel(), pixels.ravel(), len(uris)).argmax())]


def _count_in_patches(runs: _Runs, shape: tuple[int, ...], patches: tuple[int, ...]) -> NDArray[np.float64]:
    """Counts the pixels of runs in each patch, [gh, gw]. shape: of the image.

    The pixels of a row up to a column x are those of all patches before the patch of x, and a part of that patch. A run
    has the pixels up to its end without those up to its start.
    """
    (height, width), (rows, columns) = shape, patches
    lefts = -(-np.arange(columns + 1) * width // columns)
    whole, part = np.zeros((2, rows * (columns + 1)))
    for edge, sign in ((runs.stop, 1), (runs.start, -1)):
        column = edge * columns // width
        place = runs.row * rows // height * (columns + 1) + column
        whole += sign * np.bincount(place, minlength=whole.size)
        part += sign * np.bincount(place, edge - lefts[column], minlength=part.size)
    whole, part = (values.reshape(rows, columns + 1) for values in (whole, part))
    after = whole[:, ::-1].cumsum(axis=1)[:, ::-1]
    return after[:, 1:] * np.diff(lefts) + part[:, :-1]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
