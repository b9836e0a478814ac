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

    weights, similarities: [P], in the order of the prompts; weights need not sum to one.
    """
    anomalous = [number for number, prompt in enumerate(prompts) if prompt.side == "anomalous" and weights[number] > 0]
    total = float(sum(weights[number] for number in anomalous))
    best = sorted(anomalous, key=lambda number: -float(weights[number] * similarities[number]))[:_PROMPTS_KEPT]
    return tuple(
        Evidence(
            prompts[number].text, prompts[number].defect, float(weights[number]) / total, float(similarities[number])
        )
        for number in best
    )
