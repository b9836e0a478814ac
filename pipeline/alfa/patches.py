"""Stores the patches of some images, and compares those of others with them. References and peers both use it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.alfa.device import to_device

_COSINES_AT_ONCE = 1 << 24
"""Number of cosines in memory at a time, 64 MiB of float32."""


def pack(images: Sequence[Tensor]) -> Tensor:
    """Packs the patch tokens of images, [L, P, W] each with any P, for a memory: [L, sum of P, W].

    They are normalised and rounded to float16 on the CPU, which halves them and moves a distance by less than 1e-3.
    """
    return torch.cat([F.normalize(image, dim=-1).half().cpu() for image in images], dim=1)


def image_distances(tokens: Tensor, packed: Tensor, patches: Sequence[int]) -> Tensor:
    """Computes min_r (1 - <x_p, r>) / 2 of each patch and each image of a memory: [L, N, M], float32, 0 to 1.

    tokens: [L, N, W], of any length. packed: patches of M images, from pack(). patches: how many each of them has. Both
    sides are rounded to float16, so that an image in the memory has distance 0 to itself. Memory is bounded for any
    number of patches.
    """
    highest = torch.empty(*tokens.shape[:2], len(patches), device=tokens.device)
    for level, known, found in zip(tokens, packed, highest, strict=True):
        own, others = _round(level), F.normalize(to_device(known, tokens.device).float(), dim=-1)
        for number, image in enumerate(others.split(tuple(patches))):
            pieces = image.split(max(1, _COSINES_AT_ONCE // max(1, len(own))))
            found[:, number] = torch.stack([(own @ some.T).amax(1) for some in pieces]).amax(0)
    return ((1 - highest) / 2).clamp(min=0)


def _round(tokens: Tensor) -> Tensor:
    """Normalises tokens, rounds them as a memory does, and normalises again, because rounding changes their lengths."""
    return F.normalize(F.normalize(tokens, dim=-1).half().float(), dim=-1)
