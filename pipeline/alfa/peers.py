"""Compares patches with those of other photos of the night, the peers (mutual scoring, MuSc, arXiv 2401.16753).

Formulas: pipeline/alfa/README.md, "Peers".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.alfa.device import to_device
from pipeline.alfa.patches import image_distances, pack

HIGHEST = 3
"""The value v of an image is the mean distance of this many patches."""

_MOST_PATCHES = 1 << 15
"""Largest number of patches in a memory, of all peers together."""
_LEAST_FENCE = 1e-4
"""Smallest fence: rounding to float16 changes distances by up to this, and a lower fence would only separate noise."""
_EPSILON = 1e-6
"""Scores are kept this far away from 0 and 1 before their logit is taken."""


@dataclass(frozen=True)
class Calibration:
    """The fences of a class, median + 3 x 1.4826 x MAD of the values of its own peers.

    distance: fence of v, above 0. score, peak: fences of the logits of the score and of the map's highest patches,
    language included.
    """

    distance: float
    score: float
    peak: float


@dataclass(frozen=True, eq=False)
class PeerMemory:
    """The patches of a class's peers; it can be pickled.

    tokens: [L, R, W], normalised, float16, CPU: R patches of all peers, averaged over their neighbours. patches: how
    many of them each of the M peers has. fingerprints: [M], int64, of their pixels (fingerprint_pixels). uris: where
    the peers were read. earlier: how many of the peers are photos of earlier nights. calibration: None until the peers
    have been scored against each other.
    """

    tokens: Tensor
    patches: tuple[int, ...]
    fingerprints: Tensor
    uris: tuple[str, ...]
    earlier: int = 0
    calibration: Calibration | None = None

    @property
    def count(self) -> int:
        """The number of peers."""
        return len(self.patches)


def remember_peers(
    images: Sequence[Tensor], fingerprints: Sequence[int], uris: Sequence[str], earlier: int = 0
) -> PeerMemory:
    """Makes the memory of peers, without a calibration. images: the patches of each, [L, P, W], neighbours averaged.

    If they have more than 32,768 patches together, each peer keeps an equal number, drawn at random with a fixed seed.
    This bounds time and memory; neighbouring patches are very similar anyway.
    """
    most = max(1, _MOST_PATCHES // len(images))
    kept = [image if image.shape[1] <= most else image[:, _draw(image.shape[1], most)] for image in images]
    counts = tuple(image.shape[1] for image in kept)
    return PeerMemory(pack(kept), counts, torch.tensor(list(fingerprints)), tuple(uris), earlier)


def _draw(count: int, most: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].sort().values


def fingerprint_pixels(pixels: Tensor) -> Tensor:
    """Hashes the pixels of each image [B, 3, H, W], uint8, to [B], int64, on their device.

    The hash is the sum of 8-byte words times fixed odd numbers, modulo 2^64. Equal pixels have equal fingerprints;
    different pixels have different ones, except by very unlikely chance. It does not protect against forgery.
    """
    flat = pixels.permute(0, 2, 3, 1).flatten(1)
    words = F.pad(flat, (0, -flat.shape[1] % 8)).view(torch.int64)
    numbers = torch.randint(-(1 << 62), 1 << 62, words.shape[1:], generator=torch.Generator().manual_seed(0)) * 2 + 1
    return (words * to_device(numbers, pixels.device)).sum(1)


def average_neighbours(tokens: Tensor, grid: tuple[int, int], neighbourhood: int) -> Tensor:
    """Averages each patch of tokens [..., P, W] over the patches around it that exist. grid: rows, columns."""
    if neighbourhood == 1:
        return tokens
    planes = tokens.transpose(-1, -2).unflatten(-1, grid)
    side = neighbourhood // 2
    mean = F.avg_pool2d(planes.flatten(0, -4), neighbourhood, 1, side, count_include_pad=False)
    return mean.view(planes.shape).flatten(-2).transpose(-1, -2)


def peer_distance(tokens: Tensor, fingerprints: Tensor, memory: PeerMemory, share: float) -> tuple[Tensor, Tensor]:
    """Computes D_p of each patch, [B, P], and its distance to each peer, [B, P, M]; float32, 0 to 1.

    Both are averaged over the levels. D_p is the mean distance to the nearest peers, of which `share` counts. A peer
    with the same pixels, such as the image itself, is left out, and its distance is infinite. D_p is 0 for an image
    without other peers. tokens: [L, B, P, W], averaged over neighbours. fingerprints: of the images, [B].
    """
    levels, images, patches = tokens.shape[:3]
    found = image_distances(tokens.flatten(1, 2), memory.tokens, memory.patches).view(levels, images, patches, -1)
    same = fingerprints[:, None] == to_device(memory.fingerprints[None], tokens.device)
    found = found.masked_fill(same[None, :, None], torch.inf)
    others = memory.count - same.sum(1)
    nearest = found.topk(max(1, round(share * memory.count)), largest=False).values
    chosen = (share * others).round().clamp(1, nearest.shape[3]).minimum(others)
    counted = torch.arange(nearest.shape[3], device=tokens.device) < chosen[:, None, None]
    total = nearest.masked_fill(~counted, 0.0).sum(3) / chosen.clamp(min=1)[:, None]
    return total.mean(0), found.mean(0)


def image_value(distances: Tensor) -> Tensor:
    """Computes v, the mean of the 3 highest D_p of each image: [B, P] to [B]."""
    return distances.topk(min(HIGHEST, distances.shape[1])).values.mean(1)


def combine(language: Tensor, distance: Tensor, fence: Tensor, weight: float) -> Tensor:
    """Combines language and peers, not calibrated yet: (1 - u) S + u d / (d + c). All values are 0 to 1."""
    return (1 - weight) * language + weight * distance / (distance + fence)


def calibrate(combined: Tensor, fence: Tensor) -> Tensor:
    """Calibrates scores s: sigmoid(logit s - f) keeps their order, and is 0.5 at the fence f."""
    return torch.sigmoid(torch.logit(combined, _EPSILON) - fence)


def find_fence(values: Tensor) -> float:
    """Computes the fence of values [M], median + 3 x 1.4826 x MAD. It is valid with up to a third of outliers."""
    median = values.quantile(0.5)
    return float(median + 3 * 1.4826 * (values - median).abs().quantile(0.5))


@dataclass(frozen=True, eq=False)
class Unfenced:
    """The result of a peer that was scored against the others, before there are fences.

    score: S without peers. value: v. language, distances: [P] each, the map without peers, 0 to 1, and D.
    """

    score: float
    value: float
    language: Tensor
    distances: Tensor


def fence_in(memory: PeerMemory, found: Sequence[Unfenced], weight: float) -> PeerMemory:
    """Returns the memory with the calibration that follows from its own peers.

    found: the result of each peer. weight: u, the weight of the peers against language.
    """
    values = torch.tensor([item.value for item in found])
    fence = max(find_fence(values), _LEAST_FENCE)
    scores = combine(torch.tensor([item.score for item in found]), values, torch.tensor(fence), weight)
    peaks = torch.stack(
        [image_value(combine(item.language, item.distances, torch.tensor(fence), weight)[None])[0] for item in found]
    )
    levels = [find_fence(torch.logit(part, _EPSILON)) for part in (scores, peaks)]
    return replace(memory, calibration=Calibration(fence, *levels))
