"""Run-time prompt adaptation: per image, ambiguous prompts are removed (ALFA, reconstructed from its abstract).

Formulas: pipeline/alfa/README.md, "Contextual score and adaptation"; the paper is arXiv 2404.09654.

All functions work on a batch: B images, each with up to P prompts; rows of images with fewer are padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from schemas.job import Method


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of each image of a batch.

    embeddings: [B, P, D], normalised, float32, zero where padded; anomalous: [B, P], bool; valid: [B, P], bool.
    """

    embeddings: Tensor
    anomalous: Tensor
    valid: Tensor

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Which prompts are normal, and which anomalous: [B, P], bool."""
        return self.valid & ~self.anomalous, self.valid & self.anomalous


def contextual_scores(distances: Tensor, prompts: PromptBatch) -> Tensor:
    """Computes how much nearer a prompt is to the image than the opposite set is on average, [B, P].

    C(n_i) = mean_j d(a_j) - d(n_i), C(a_j) = mean_i d(n_i) - d(a_j), with d = 1 - cosine; distances: [B, P].
    """
    mean_normal, mean_anomalous = _side_means(distances, prompts)
    return torch.where(prompts.anomalous, mean_normal, mean_anomalous) - distances


def adapt(similarities: Tensor, prompts: PromptBatch, method: Method) -> Tensor:
    """Computes the weight of each prompt for each image, [B, P]: 1 if kept, 0 if removed or padded; soft: a share.

    similarities: cosines of image and prompts, [B, P], float32. On the side that the image leans to (the smaller mean
    distance), prompts with C >= 0 are kept, on the other side those with C <= 0. Each side keeps at least its floor,
    the best prompts first.
    """
    if method.adaptation == "none":
        return prompts.valid.float()
    if method.adaptation == "random":
        kept = adapt(similarities, prompts, method.model_copy(update={"adaptation": "mean"}))
        return random_filter(kept, prompts, torch.Generator().manual_seed(0))
    distances = 1 - similarities
    mean_normal, mean_anomalous = _side_means(distances, prompts)
    leaning = prompts.anomalous == (mean_anomalous < mean_normal)
    scores = contextual_scores(distances, prompts)
    # oriented: how far a prompt lies on its own side of the other set's mean; a negative value is ambiguous.
    oriented = torch.where(leaning, scores, -scores)
    if method.adaptation == "soft":
        return _soft(oriented, prompts, method.soft_temperature)
    if method.adaptation == "interval":
        keep = ~_overlap(distances, prompts)
    elif method.adaptation == "rank":
        beaten = _share_beaten(distances, prompts)
        oriented = torch.where(leaning, beaten - 0.5, 0.5 - beaten)
        keep = oriented >= 0
    else:
        keep = oriented >= 0
    keep = keep & prompts.valid
    return (keep | _floor(oriented, keep, prompts, method.floor_count, method.floor_share)).float()


def random_filter(weights: Tensor, prompts: PromptBatch, generator: torch.Generator) -> Tensor:
    """Keeps as many prompts per side and image as `weights` does, but chosen at random: a control for adaptations."""
    noise = torch.rand(weights.shape, generator=generator).to(weights.device)
    kept = torch.zeros_like(prompts.valid)
    for side in prompts.sides:
        count = ((weights > 0) & side).sum(1, keepdim=True)
        kept |= side & (_rank_within(noise, side) < count)
    return kept.float()


def prototypes(weights: Tensor, prompts: PromptBatch) -> Tensor:
    """Computes the normalised weighted means of both sides, [B, 2, D], the normal prototype first."""
    sides = torch.stack([weights * side for side in prompts.sides], dim=1)
    return F.normalize(sides @ prompts.embeddings, dim=-1)


def _side_means(distances: Tensor, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
    normal, anomalous = ((distances * side).sum(1, keepdim=True) / side.sum(1, keepdim=True) for side in prompts.sides)
    return normal, anomalous


def _share_beaten(distances: Tensor, prompts: PromptBatch) -> Tensor:
    """Computes the share of the opposite prompts that are farther from the image, [B, P]; ties count half."""
    nearer = (distances[:, :, None] < distances[:, None, :]).float()
    tied = (distances[:, :, None] == distances[:, None, :]).float()
    opposite = ((prompts.anomalous[:, :, None] != prompts.anomalous[:, None, :]) & prompts.valid[:, None, :]).float()
    return ((nearer + 0.5 * tied) * opposite).sum(2) / opposite.sum(2)


def _overlap(distances: Tensor, prompts: PromptBatch) -> Tensor:
    """Finds the prompts whose distance lies in both [min d_N, max d_N] and [min d_A, max d_A]: [B, P], bool."""
    inside = torch.ones_like(prompts.valid)
    for side in prompts.sides:
        low = distances.masked_fill(~side, torch.inf).amin(1, keepdim=True)
        high = distances.masked_fill(~side, -torch.inf).amax(1, keepdim=True)
        inside &= (low <= distances) & (distances <= high)
    return inside


def _floor(oriented: Tensor, keep: Tensor, prompts: PromptBatch, count: int, share: float) -> Tensor:
    """Finds the max(count, ceil(share of the side)) best prompts of each side, kept ones first: [B, P], bool."""
    best = torch.zeros_like(prompts.valid)
    for side in prompts.sides:
        # A small number is subtracted, because 0.1 * 30 is 3.0000000000000004, and must stay 3.
        least = torch.ceil(side.sum(1, keepdim=True).double() * share - 1e-9).clamp(min=count)
        best |= side & (_rank_within(oriented.masked_fill(keep, torch.inf), side) < least)
    return best


def _rank_within(values: Tensor, side: Tensor) -> Tensor:
    """Ranks each prompt among those of its side, [B, P]; 0 is the highest, and equal values keep their order."""
    order = values.masked_fill(~side, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1)


def _soft(oriented: Tensor, prompts: PromptBatch, temperature: float) -> Tensor:
    weights = torch.zeros_like(oriented)
    for side in prompts.sides:
        weights = weights + torch.softmax((oriented / temperature).masked_fill(~side, -torch.inf), dim=1)
    return weights
