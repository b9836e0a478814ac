"""Few-shot: compares patches with those of a few known-good images.

Formula: pipeline/alfa/README.md, "Few-shot"; the idea is that of PatchCore and WinCLIP+.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.alfa.patches import image_distances, pack


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
        """Returns the memory without one image. Raises ValueError if there is no other image."""
        if self.shots < 2:
            raise ValueError("a memory of one image has no others")
        images = self.tokens.split(self.patches, dim=1)
        others = [*images[:number], *images[number + 1 :]]
        return ReferenceMemory(torch.cat(others, dim=1), (*self.patches[:number], *self.patches[number + 1 :]))


def remember(images: Sequence[Tensor]) -> ReferenceMemory:
    """Makes the memory of reference images.

    Each is given by its patch tokens of the chosen levels, [L, P, W], any P.
    """
    return ReferenceMemory(pack(images), tuple(image.shape[1] for image in images))


def reference_distance(tokens: Tensor, memory: ReferenceMemory) -> Tensor:
    """Computes R_p = min_r (1 - <x_p, r>) / 2, averaged over the levels: [B, P], float32, 0 to 1.

    tokens: [L, B, P, W], of any length. A reference image itself is at distance 0.
    """
    distances = image_distances(tokens.flatten(1, 2), memory.tokens, memory.patches).amin(2).mean(0)
    return distances.view(tokens.shape[1:3])
