"""Explains the score of an image by the prompts that decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.prompts import Prompt

_PROMPTS_KEPT = 5


@dataclass(frozen=True)
class Evidence:
    """A kept anomalous prompt. weight: its share of the anomalous prototype; similarity: cosine with the image."""

    prompt: str
    defect: str | None
    weight: float
    similarity: float


def explain(
    prompts: Sequence[Prompt], weights: NDArray[np.float32], similarities: NDArray[np.float32]
) -> tuple[Evidence, ...]:
    """Returns the five kept anomalous prompts of an image with the highest weight x similarity, best first.

    weights, similarities: of each prompt, in their order, perhaps padded at the end; weights need not sum to one.
    """
    kept = [
        (prompt, weight, similarity)
        for prompt, weight, similarity in zip(prompts, weights.tolist(), similarities.tolist(), strict=False)
        if prompt.side == "anomalous" and weight > 0
    ]
    total = sum(weight for _, weight, _ in kept)
    best = sorted(kept, key=lambda item: -item[1] * item[2])[:_PROMPTS_KEPT]
    return tuple(
        Evidence(prompt.text, prompt.defect, weight / total, similarity) for prompt, weight, similarity in best
    )
