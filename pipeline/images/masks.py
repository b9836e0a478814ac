"""Turns an anomaly map on the patch grid into a map of the image's size, a mask, regions and PNG bytes."""

from __future__ import annotations

import functools
import io
import itertools
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
_BAND_PIXELS = 1 << 17
"""Pixels that are upsampled at a time, so that they stay in the cache of a core."""


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


@dataclass(frozen=True, eq=False)
class _Upsampling:
    """A map on the patch grid, prepared to be upsampled bilinearly to an image (pixel centres, edges held).

    patch_rows [height]: the row of patches whose centres are before each row of pixels. weights [height]: the weight of
    the row of patches after it. lines [gh + 1, width]: the rows of patches, upsampled along the columns; the last one
    is there twice.
    """

    patch_rows: NDArray[np.int64]
    weights: NDArray[np.float64]
    lines: NDArray[np.float64]

    @classmethod
    def of(cls, grid: NDArray[np.float32], width: int, height: int) -> _Upsampling:
        rows, weights = _blend(height, grid.shape[0])
        columns, shares = _blend(width, grid.shape[1])
        held = np.concatenate([grid, grid[-1:]]).astype(np.float64)
        before, after = held[:, columns], held[:, np.minimum(columns + 1, grid.shape[1] - 1)]
        lines = (before + shares * (after - before)).astype(np.float32)  # so that no pixel exceeds the patches
        return cls(rows, weights, lines.astype(np.float64))

    def bands(self) -> Iterator[tuple[slice, int]]:
        """Yields the image's rows in slices, each with its row of patches."""
        height, most = len(self.patch_rows), max(1, _BAND_PIXELS // self.lines.shape[1])
        edges = [0, *(np.flatnonzero(np.diff(self.patch_rows)) + 1).tolist(), height]
        for first, last in itertools.pairwise(edges):
            for start in range(first, last, most):
                yield slice(start, min(start + most, last)), int(self.patch_rows[start])

    def compute(self, rows: slice, row: int, columns: slice) -> NDArray[np.float32]:
        """Computes some columns of a band."""
        before, after = self.lines[row : row + 2, columns]
        band: NDArray[np.float64] = np.multiply.outer(self.weights[rows], after - before)
        band += before
        return band.astype(np.float32)


def upsample(grid: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
    """Upsamples a map bilinearly from the patch grid [gh, gw] to the image [height, width] (pixel centres, edges held).

    Values are never above the highest patch or below the lowest.
    """
    upsampling = _Upsampling.of(grid, width, height)
    result = np.empty((height, width), dtype=np.float32)
    for rows, row in upsampling.bands():
        result[rows] = upsampling.compute(rows, row, slice(None))
    return result


def _blend(length: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns, for each pixel of an axis, the patch whose centre is before it, and the weight of the next patch."""
    place: NDArray[np.float64] = ((np.arange(length) + 0.5) * count / length - 0.5).clip(0, count - 1)
    before = place.astype(np.int64)
    return before, place - before


@dataclass(frozen=True, eq=False)
class Mask:
    """The pixels at which a map reaches a threshold.

    lines: uint8 [height, 1 + width], 255 where it does and else 0, behind the 0 with which lines of a PNG start. runs:
    the set pixels. peaks [N]: the highest map value of each run.
    """

    lines: NDArray[np.uint8]
    runs: _Runs
    peaks: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.lines.shape[0], self.lines.shape[1] - 1

    @property
    def share(self) -> float:
        """Share of the pixels that are set, 0 to 1."""
        height, width = self.shape
        return float((self.runs.stop - self.runs.start).sum() / (height * width))


def draw_mask(grid: NDArray[np.float32], width: int, height: int, threshold: float) -> Mask:
    """Marks the pixels of an image at which its map, as upsample makes it of grid [gh, gw], reaches a threshold.

    The map is computed only in those columns of each row of patches where it can reach it. So the time depends on the
    size of the defects more than on that of the photo.
    """
    upsampling, least = _Upsampling.of(grid, width, height), np.float32(threshold)
    reached = np.maximum(upsampling.lines[:-1], upsampling.lines[1:]) >= least
    lefts, rights = reached.argmax(axis=1).tolist(), (width - reached[:, ::-1].argmax(axis=1)).tolist()
    lines = np.zeros((height, 1 + width), dtype=np.uint8)
    runs, peaks = [_Runs.none()], [np.empty(0, np.float32)]
    for rows, row in upsampling.bands():
        left, right = lefts[row], rights[row]
        if not reached[row, left]:
            continue
        band = upsampling.compute(rows, row, slice(left, right))
        marked = band >= least
        np.negative(marked, out=lines[rows, 1 + left : 1 + right], casting="unsafe", dtype=np.uint8)
        found = _find_runs(marked)
        if len(found.row):
            runs.append(_Runs(found.row + rows.start, found.start + left, found.stop + left))
            peaks.append(_find_peaks(band, found))
    return Mask(lines, _Runs.joined(runs), np.concatenate(peaks))


def _find_peaks(band: NDArray[np.float32], runs: _Runs) -> NDArray[np.float32]:
    """Returns the highest value of each run, [N]. There is at least one run."""
    edges = np.stack([runs.row * band.shape[1] + edge for edge in (runs.start, runs.stop)], axis=1).ravel()
    # reduceat also gives an entry for each gap between two runs, even an empty one; [::2] drops those.
    peaks: NDArray[np.float32] = np.maximum.reduceat(band.ravel(), edges[: -1 if edges[-1] == band.size else None])[::2]
    return peaks


def find_regions(
    mask: Mask,
    defect_names: Sequence[str],
    defect_grid: NDArray[np.float32],
    peer_uris: Sequence[str] = (),
    peer_grid: NDArray[np.int16] | None = None,
) -> list[Region]:
    """Finds the regions (8 neighbours) of a mask, the highest peak first.

    The defect of a region is the one whose prompts are nearest to the mean local embedding of the region; None if no
    defect is described. It has the highest mean cosine over the region's pixels, because the mean is linear and its
    length is common to all defects. The peer of a region is the one that is nearest on most of its pixels.

    defect_grid: cosines of each patch with the K defects, [K, gh, gw]. peer_grid: for each patch the index in peer_uris
    of its nearest peer, [gh, gw].
    """
    runs, shape = mask.runs, mask.shape
    if not len(runs.row):
        return []
    labels = _label_runs(runs, shape[1])
    order = np.argsort(labels, kind="stable")  # the rows of each region still ascend
    firsts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    lasts = np.append(firsts[1:], len(order)) - 1
    lefts, tops = np.minimum.reduceat(runs.start[order], firsts), runs.row[order][firsts]
    widths, heights = np.maximum.reduceat(runs.stop[order], firsts) - lefts, runs.row[order][lasts] + 1 - tops
    areas = np.add.reduceat((runs.stop - runs.start)[order], firsts)
    peaks = np.maximum.reduceat(mask.peaks[order], firsts)
    defects = _nearest_defects(runs, labels, shape, defect_names, defect_grid)
    peers = _nearest_peers(runs, labels, shape, peer_uris, peer_grid)
    columns = (values.tolist() for values in (lefts, tops, widths, heights, areas, peaks))
    regions = [Region(*values) for values in zip(*columns, defects, peers, strict=True)]
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


def encode_mask(mask: Mask) -> bytes:
    """Encodes a mask as an 8-bit greyscale PNG: 255 where it is set, else 0.

    Lines are not filtered. Pillow has no option for that; it takes twice the time, and three times the bytes.
    """
    height, width = mask.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", _deflate(mask.lines.data)), (b"IEND", b""))
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
    return encode_mask(draw_mask(np.zeros((1, 1), dtype=np.float32), width, height, np.inf))


def encode_map(anomaly_map: NDArray[np.float32]) -> bytes:
    """Encodes a map as a 16-bit greyscale PNG. value / 65535 is the map, cut at 1 (with references it may exceed 1)."""
    return _png(Image.fromarray(np.rint(np.clip(anomaly_map, 0.0, 1.0) * 65535).astype(np.uint16)))


@dataclass(frozen=True)
class _Runs:
    """Runs of set pixels, row by row, int64 [N] each. row; start: first column; stop: the column after the last."""

    row: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]

    @classmethod
    def joined(cls, parts: Sequence[_Runs]) -> _Runs:
        """The runs of all parts, in their order."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("row", "start", "stop")))

    @classmethod
    def none(cls) -> _Runs:
        return cls(*np.empty((3, 0), dtype=np.int64))


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
    ends = np.cumsum(count)
    below = np.arange(ends[-1]) + np.repeat(first - ends + count, count)
    edges = np.ones(len(below), dtype=np.int8), below, np.append(0, ends)
    touching = sparse.csr_array(edges, shape=(len(starts),) * 2)
    labels: NDArray[np.int32] = csgraph.connected_components(touching, directed=False)[1]
    return labels


def _nearest_defects(
    runs: _Runs, labels: NDArray[np.int32], shape: tuple[int, int], names: Sequence[str], grid: NDArray[np.float32]
) -> list[str | None]:
    """Returns the name for each of R regions. labels [N]: the region of each run, 0 to R - 1."""
    if not names:
        return [None] * (int(labels.max()) + 1)
    pixels = _count_in_patches(runs, labels, shape, grid.shape[1:])
    return [names[nearest] for nearest in np.einsum("krc,nrc->nk", grid, pixels).argmax(axis=1).tolist()]


def _nearest_peers(
    runs: _Runs,
    labels: NDArray[np.int32],
    shape: tuple[int, int],
    uris: Sequence[str],
    grid: NDArray[np.int16] | None,
) -> list[str | None]:
    """Returns the address for each of R regions."""
    if grid is None or not uris:
        return [None] * (int(labels.max()) + 1)
    pixels = _count_in_patches(runs, labels, shape, grid.shape)
    votes = pixels.reshape(len(pixels), -1) @ (grid.reshape(-1, 1) == np.arange(len(uris)))
    return [uris[nearest] for nearest in votes.argmax(axis=1).tolist()]


def _count_in_patches(
    runs: _Runs, labels: NDArray[np.int32], shape: tuple[int, int], patches: tuple[int, ...]
) -> NDArray[np.float64]:
    """Counts the pixels of R regions in each patch, [R, gh, gw]. shape: of the image.

    The pixels of a row up to a column x are those of all patches before the patch of x, and a part of that patch. A run
    has the pixels up to its end without those up to its start.
    """
    (height, width), (rows, columns) = shape, patches
    lefts = -(-np.arange(columns + 1) * width // columns)
    size = (int(labels.max()) + 1, rows, columns + 1)
    whole, part = np.zeros((2, np.prod(size)))
    lines = (labels * rows + runs.row * rows // height) * (columns + 1)
    for edge, sign in ((runs.stop, 1), (runs.start, -1)):
        column = edge * columns // width
        whole += sign * np.bincount(lines + column, minlength=whole.size)
        part += sign * np.bincount(lines + column, edge - lefts[column], minlength=part.size)
    whole, part = whole.reshape(size), part.reshape(size)
    after = whole[..., ::-1].cumsum(axis=-1)[..., ::-1]
    pixels: NDArray[np.float64] = after[..., 1:] * np.diff(lefts) + part[..., :-1]
    return pixels


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
