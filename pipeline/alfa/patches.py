"""Patches of some images, against which those of others are held: what references and peers share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.alfa.device import to_device

_COSINES_AT_ONCE = 1 << 24
"""Cosines that are held at a time, 64 MiB of float32."""


def pack(images: Sequence[Tensor]) -> Tensor:
    """Packs the patch tokens of images for a memory: [L, P, W] each, with a P of its own, to [L, sum of P, W].

    They are normalised and rounded to float16 on the CPU, which halves them and moves a distance by less than 1e-3.
    """
    return torch.cat([F.normalize(image, dim=-1).half().cpu() for image in images], dim=1)


def image_distances(tokens: Tensor, packed: Tensor, patches: Sequence[int]) -> Tensor:
    """Computes min_r (1 - <x_p, r>) / 2 of each patch and each image of a memory: [L, N, M], float32, 0 to 1.

    tokens: [L, N, W], of any length. packed: of M images, as pack() gives it; patches: how many each of them has. Both
    sides are rounded to float16 alike, so that an image in the memory is at distance 0 from itself. It works in pieces
    of bounded size, however many patches there are.
    """
    highest = torch.empty(*tokens.shape[:2], len(patches), device=tokens.device)
    for level, known, found in zip(tokens, packed, highest, strict=True):
        own, others = _round(level), F.normalize(to_device(known, tokens.device).float(), dim=-1)
        for number, image in enumerate(others.split(tuple(patches))):
            pieces = image.split(max(1, _COSINES_AT_ONCE // max(1, len(own))))
            found[:, number] = torch.stack([(own @ some.T).amax(1) for some in pieces]).amax(0)
    return ((1 - highest) / 2).clamp(min=0)


def _round(tokens: Tensor) -> Tensor:
    """Normalises as a memory holds them, and again: rounding leaves lengths that are not quite one."""
    return F.normalize(F.normalize(tokens, dim=-1).half().float(), dim=-1)
