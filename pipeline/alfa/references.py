"""Few-shot: how far a patch is from every patch of a handful of known-good images.

Formula: pipeline/alfa/README.md, "Few-shot"; the idea is that of PatchCore and WinCLIP+.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.alfa.device import to_device

_COSINES_AT_ONCE = 1 << 24
"""Cosines that are held at a time, 64 MiB of float32."""


@dataclass(frozen=True, eq=False)
class ReferenceMemory:
    """The patches of a class's reference images; it can be pickled, to share it with all actors.

    tokens: [L, R, W], normalised, float16, CPU: R patches of all images, at each of L levels. patches: how many of
    them each image has; large ones are cut in tiles, and have more.
    """

    tokens: Tensor
    patches: tuple[int, ...]

    @property
    def shots(self) -> int:
        """The number of reference images."""
        return len(self.patches)

    def without(self, number: int) -> ReferenceMemory:
        """The memory of the other images. Raises ValueError where there are none."""
        if self.shots < 2:
            raise ValueError("a memory of one image has no others")
        images = self.tokens.split(self.patches, dim=1)
        others = [*images[:number], *images[number + 1 :]]
        return ReferenceMemory(torch.cat(others, dim=1), (*self.patches[:number], *self.patches[number + 1 :]))


def remember(images: Sequence[Tensor]) -> ReferenceMemory:
    """The memory of reference images; each as its patch tokens [L, P, W] of the chosen levels, with a P of its own.

    float16 halves it, and moves a distance by less than 1e-3.
    """
    tokens = torch.cat([F.normalize(image, dim=-1).half().cpu() for image in images], dim=1)
    return ReferenceMemory(tokens, tuple(image.shape[1] for image in images))


def reference_distance(tokens: Tensor, memory: ReferenceMemory) -> Tensor:
    """R_p = min_r (1 - <x_p, r>) / 2, averaged over the levels: [B, P], float32, 0 to 1.

    tokens: [L, B, P, W], of any length. Both sides are rounded to float16 alike, so that a reference image itself is at
    distance 0. It works in pieces of bounded size, however many references there are.
    """
    distances = torch.zeros(tokens.shape[1:3], device=tokens.device)
    for level, known in zip(tokens, memory.tokens, strict=True):
        patches = _round(level.flatten(0, 1))
        highest = torch.full(patches.shape[:1], -torch.inf, device=tokens.device)
        for some in known.split(max(1, _COSINES_AT_ONCE // len(patches))):
            cosines = patches @ F.normalize(to_device(some, tokens.device).float(), dim=-1).T
            highest = torch.maximum(highest, cosines.amax(1))
        distances += ((1 - highest) / 2).clamp(min=0).view_as(distances)
    return distances / len(tokens)


def _round(tokens: Tensor) -> Tensor:
    """Normalised as a memory holds them, and again: rounding leaves lengths that are not quite one."""
    return F.normalize(F.normalize(tokens, dim=-1).half().float(), dim=-1)
