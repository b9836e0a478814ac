"""ALFA as one call on one batch: image score and anomaly map by one model, in one forward pass."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.alfa.adaptation import PromptBatch, adapt, prototypes
from pipeline.alfa.aligner import align
from pipeline.alfa.encoder import Encoder, ImageFeatures, ModelError
from pipeline.alfa.explain import Evidence, explain
from schemas.job import Method
from schemas.prompts import PromptEnsemble


@dataclass(frozen=True, eq=False)
class PromptEmbeddings:
    """The prompts of a class, encoded once; it can be pickled, to share it with all actors.

    embeddings: [P, D], normalised, float32, CPU; is_anomalous: [P], bool; defects: the K names of described defects;
    defect_embeddings: [K, D], the normalised mean of the prompts that name the defect.
    """

    ensemble: PromptEnsemble
    embeddings: Tensor
    is_anomalous: Tensor
    defects: tuple[str, ...]
    defect_embeddings: Tensor


@dataclass(frozen=True, eq=False)
class Features:
    """What a batch of B images looks like before any prompt. local: aligned patches [L, B, P, D], normalised."""

    image: ImageFeatures
    local: Tensor


@dataclass(frozen=True)
class Detection:
    """What one image is given.

    score, score_global, score_local: 0 to 1, raw. grid: anomaly map on the patch grid [gh, gw], float32, probabilities.
    defect_grid: cosine of each patch with each defect [K, gh, gw], float32. kept: [P], which prompts of the ensemble
    adaptation has left, in its order.
    """

    score: float
    score_global: float
    score_local: float
    grid: NDArray[np.float32]
    defect_grid: NDArray[np.float32]
    kept: NDArray[np.bool_]
    kept_normal: int
    kept_anomalous: int
    explanation: tuple[Evidence, ...]


class Detector:
    """ALFA with the options of a Method."""

    def __init__(self, encoder: Encoder, method: Method, aligner: str) -> None:
        """Raises ModelError where levels or depth do not exist in the model."""
        self.encoder = encoder
        self._method = method
        self._aligner = aligner
        self._value_depth = _value_depth(encoder.blocks, method) if aligner == "value" else None
        self._levels = _resolve_levels(encoder.blocks, method.levels, self._value_depth)

    def embed(self, ensemble: PromptEnsemble) -> PromptEmbeddings:
        """Encodes all prompts of a class.

        Raises ValueError where a side has no prompts, or a prompt is longer than the model reads.
        """
        prompts = ensemble.prompts
        for side in ("normal", "anomalous"):
            if not any(prompt.side == side for prompt in prompts):
                raise ValueError(f"the prompts of {ensemble.class_name} have none of the {side} side")
        embeddings = self.encoder.encode_texts([prompt.text for prompt in prompts])
        defects = tuple(dict.fromkeys(prompt.defect for prompt in prompts if prompt.defect is not None))
        naming = torch.tensor([[prompt.defect == name for prompt in prompts] for name in defects], dtype=torch.float32)
        means = F.normalize(naming.view(len(defects), len(prompts)) @ embeddings, dim=-1)
        anomalous = torch.tensor([prompt.side == "anomalous" for prompt in prompts])
        return PromptEmbeddings(ensemble, embeddings, anomalous, defects, means)

    @property
    def features_key(self) -> tuple[Hashable, ...]:
        """Detectors of one encoder whose keys are equal see the same features."""
        ridge_lambda = self._method.ridge_lambda if self._aligner == "ridge" else None
        return self._aligner, self._levels, self._value_depth, ridge_lambda

    def detect(self, pixels: Tensor, prompts: Sequence[PromptEmbeddings]) -> list[Detection]:
        """Detections of pixels [B, 3, H, W], uint8, of the encoder's size; prompts: one an image, any mix of classes.

        Raises ValueError where pixels have another size, or prompts another number.
        """
        if len(prompts) != len(pixels):
            raise ValueError(f"{len(pixels)} images came with {len(prompts)} sets of prompts; one an image is needed")
        return self.judge(self.features(pixels), prompts)

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> Features:
        """All of the model's work on pixels [B, 3, H, W], uint8. Raises ValueError where they have another size."""
        image = self.encoder.encode_images(pixels, self._levels, self._value_depth)
        return Features(image, align(image, self.encoder, self._aligner, self._method.ridge_lambda))

    @torch.inference_mode()
    def judge(self, features: Features, prompts: Sequence[PromptEmbeddings]) -> list[Detection]:
        """Features against prompts, one set an image: cheap, so that many options can be tried on the same features.

        The anomaly map averages the levels, then goes through a 3x3 mean filter; score = (1 - w) global + w local,
        local the mean of the highest patches (method.md, "Image score" and "Fine-grained aligner").
        """
        method, encoder = self._method, self.encoder
        embedding, local = features.image.embedding, features.local
        batch = _gather(prompts, encoder.device)
        similarities = (batch.embeddings @ embedding[:, :, None])[..., 0]
        weights = adapt(similarities, batch, method)
        sides = prototypes(weights, batch)
        score_global = self._anomalous_share(embedding[:, None], sides)[:, 0]
        grid = torch.stack([self._anomalous_share(level, sides) for level in local]).mean(0)
        grid = _mean_filter(grid.view(-1, 1, *encoder.grid))[:, 0]
        top = min(method.local_top_k, grid[0].numel())
        score_local = grid.flatten(1).topk(top).values.mean(1)
        score = (1 - method.local_weight) * score_global + method.local_weight * score_local
        defects = _pad([item.defect_embeddings for item in prompts]).to(encoder.device)
        defect_grid = (defects @ F.normalize(local.mean(0), dim=-1).transpose(1, 2)).unflatten(2, encoder.grid)
        kept = torch.stack([((weights > 0) & side).sum(1) for side in batch.sides], dim=1).tolist()
        scores = torch.stack([score, score_global, score_local], dim=1).tolist()
        grids, defect_grids, all_weights, all_similarities = (
            part.cpu().numpy() for part in (grid, defect_grid, weights, similarities)
        )
        return [
            Detection(
                score=scores[i][0],
                score_global=scores[i][1],
                score_local=scores[i][2],
                grid=grids[i],
                defect_grid=defect_grids[i, : len(item.defects)],
                kept=all_weights[i, : len(item.ensemble.prompts)] > 0,
                kept_normal=kept[i][0],
                kept_anomalous=kept[i][1],
                explanation=explain(item.ensemble.prompts, all_weights[i], all_similarities[i]),
            )
            for i, item in enumerate(prompts)
        ]

    def _anomalous_share(self, embeddings: Tensor, sides: Tensor) -> Tensor:
        """softmax(<x, t_N> / tau, <x, t_A> / tau)[anomalous] of embeddings [B, P, D] and sides [B, 2, D]: [B, P]."""
        logits = self.encoder.logit_scale * embeddings @ sides.transpose(1, 2)
        return logits.softmax(-1)[..., 1]


def _value_depth(blocks: int, method: Method) -> int:
    depth = method.value_depth if method.value_depth is not None else blocks - blocks // 4
    if depth > blocks:
        raise ModelError(f"method.value_depth is {depth}, but the model has {blocks} blocks")
    return depth


def _resolve_levels(blocks: int, levels: Sequence[int], value_depth: int | None) -> tuple[int, ...]:
    first = 0 if value_depth is None else blocks - value_depth
    resolved = sorted({level + blocks if level < 0 else level for level in levels})
    if not all(first <= level < blocks for level in resolved):
        raise ModelError(
            f"method.levels {list(levels)} must name blocks {first} to {blocks - 1} of this model and aligner "
            f"(or {first - blocks} to -1, from the last)"
        )
    return tuple(resolved)


def _gather(prompts: Sequence[PromptEmbeddings], device: torch.device) -> PromptBatch:
    """Pads each distinct class once, then picks a row an image."""
    distinct = {id(item): item for item in prompts}
    places = {key: place for place, key in enumerate(distinct)}
    rows = torch.tensor([places[id(item)] for item in prompts])
    embeddings = _pad([item.embeddings for item in distinct.values()])
    anomalous = _pad([item.is_anomalous for item in distinct.values()])
    valid = _pad([torch.ones_like(item.is_anomalous) for item in distinct.values()])
    embeddings, anomalous, valid = (part.to(device)[rows.to(device)] for part in (embeddings, anomalous, valid))
    return PromptBatch(embeddings, anomalous, valid)


def _pad(parts: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def _mean_filter(grid: Tensor) -> Tensor:
    """3x3 mean on [B, 1, gh, gw]; at the edges over the patches that exist."""
    return F.avg_pool2d(grid, 3, stride=1, padding=1, count_include_pad=False)
