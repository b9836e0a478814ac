"""ALFA on one batch: image scores and anomaly maps by one model, in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.alfa.adaptation import PromptBatch, adapt, prototypes
from pipeline.alfa.aligner import align
from pipeline.alfa.detection import Detection, Features, PromptEmbeddings
from pipeline.alfa.device import to_device, to_host
from pipeline.alfa.encoder import Encoder
from pipeline.alfa.explain import explain
from pipeline.alfa.peers import (
    Calibration,
    PeerMemory,
    average_neighbours,
    calibrate,
    combine,
    fingerprint_pixels,
    image_value,
    peer_distance,
    remember_peers,
)
from pipeline.alfa.references import ReferenceMemory, reference_distance, remember
from pipeline.alfa.weights import ModelError
from pipeline.tiling import Tiling
from schemas.job import Method, Peers, References
from schemas.prompts import PromptEnsemble

_MOST_DEFECT_PATCHES = 64
"""Largest side of the defect grid. Tiles would make it large, and it has a layer for each defect of the class."""
_UNFENCED = Calibration(1.0, 0.0, 0.0)


Pending = Callable[[], list[Detection]]
"""Detections that the device is still computing. Calling it waits for them."""


@dataclass(frozen=True, eq=False)
class _Adapted:
    """The prompts adapted to each image.

    similarities, weights: [B, P]. sides: prototypes [B, 2, D]. kept: prompts per side [B, 2]. score_global: [B].
    """

    similarities: Tensor
    weights: Tensor
    sides: Tensor
    kept: Tensor
    score_global: Tensor


class Detector:
    """ALFA with the options of a Method."""

    def __init__(
        self, encoder: Encoder, method: Method, references: References | None = None, peers: Peers | None = None
    ) -> None:
        """method: of a job, JobConfig.resolved_method; left open, the aligner is `value` and the level the last block.

        Raises ModelError where levels or depth do not exist in the model.
        """
        self.encoder = encoder
        self._method = method
        self._aligner = method.aligner or "value"
        self._value_depth = _value_depth(encoder.blocks, method) if self._aligner == "value" else None
        self._levels = _resolve_levels(encoder.blocks, method.levels or (-1,), self._value_depth)
        self._peers = peers
        self._reference_levels = _compared_levels(encoder.blocks, "references", references)
        self._peer_levels = _compared_levels(encoder.blocks, "peers", peers)
        self._compared_levels = tuple(sorted({*self._reference_levels, *self._peer_levels}))

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
        """Two detectors with the same encoder and equal keys compute the same features."""
        ridge_lambda = self._method.ridge_lambda if self._aligner == "ridge" else None
        return self._aligner, self._levels, self._value_depth, ridge_lambda, self._compared_levels

    def remember(self, images: Sequence[Tensor], at_once: int = 32) -> ReferenceMemory:
        """Encodes known-good images into a memory.

        images: the views [V, 3, H, W] of each, uint8, of the encoder's size: its tiles, or only the whole image.
        at_once: views per forward pass.
        """
        return remember([torch.cat(list(self._reference_tokens(views, at_once)), dim=1) for views in images])

    def _reference_tokens(self, views: Tensor, at_once: int) -> Iterator[Tensor]:
        for some in views.split(at_once):
            features = self.encoder.encode_images(some, compared_levels=self._reference_levels)
            yield features.compared_tokens.flatten(1, 2)

    def remember_peers(
        self,
        images: Sequence[Tensor],
        fingerprints: Sequence[int],
        uris: Sequence[str],
        earlier: int = 0,
        at_once: int = 32,
    ) -> PeerMemory:
        """Encodes peers into a memory, which is not calibrated yet. images, at_once: as remember() takes them.

        fingerprints: of the whole photos, as the model sees them, see fingerprint_pixels. uris: where they were read.
        earlier: how many of them are from earlier nights.
        """
        tokens = [torch.cat(list(self._peer_tokens(views, at_once)), dim=1) for views in images]
        return remember_peers(tokens, fingerprints, uris, earlier)

    def _peer_tokens(self, views: Tensor, at_once: int) -> Iterator[Tensor]:
        for some in views.split(at_once):
            features = self.encoder.encode_images(some, compared_levels=self._peer_levels)
            yield self._neighbourhoods(features.compared_tokens).flatten(1, 2).cpu()

    def _neighbourhoods(self, tokens: Tensor) -> Tensor:
        assert self._peers is not None
        return average_neighbours(tokens, self.encoder.grid, self._peers.neighbourhood)

    def detect(self, pixels: Tensor, prompts: Sequence[PromptEmbeddings]) -> list[Detection]:
        """Scores pixels [B, 3, H, W], uint8, of the encoder's size. prompts: those of each image; classes may differ.

        Raises ValueError where pixels have another size, or prompts another number.
        """
        return self.start(pixels, prompts)()

    def start(self, pixels: Tensor, prompts: Sequence[PromptEmbeddings]) -> Pending:
        """Starts scoring as detect does, and returns at once, so that the next batch can be started meanwhile."""
        if len(prompts) != len(pixels):
            raise ValueError(f"{len(pixels)} images came with {len(prompts)} sets of prompts; each image needs one")
        return self._start_scoring(self.features(pixels), prompts)

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> Features:
        """Computes the features of pixels [B, 3, H, W], uint8: all of the model's work on images.

        Raises ValueError where pixels have another size.
        """
        pixels = to_device(pixels, self.encoder.device)
        image = self.encoder.encode_images(pixels, self._levels, self._value_depth, self._compared_levels)
        local = align(image, self.encoder, self._aligner, self._method.ridge_lambda)
        return Features(image, local, fingerprint_pixels(pixels))

    def score_features(self, features: Features, prompts: Sequence[PromptEmbeddings]) -> list[Detection]:
        """Scores features with the prompts of each image. This is cheap, so many options can be tried on them.

        The anomaly map is the mean of the levels' maps after a 3x3 mean filter. score = (1 - w) global + w local, where
        local is the mean of the highest patches. With references, R is added to the map, and the score becomes
        (score + max R) / 2. With peers, map and score are combined with the distances to the peers, and calibrated.
        Formulas: pipeline/alfa/README.md, "Image score", "Fine-grained aligner", "Few-shot" and "Peers".
        """
        return self._start_scoring(features, prompts)()

    @torch.inference_mode()
    def _start_scoring(self, features: Features, prompts: Sequence[PromptEmbeddings]) -> Pending:
        adapted = self._adapt_prompts(features.image.embedding, prompts)
        patches = self._score_patches(features, adapted.sides, prompts, features.fingerprints)
        return self._assemble(adapted, patches.unflatten(2, self.encoder.grid), prompts)

    @torch.inference_mode()
    def start_tiled(
        self, whole: Tensor, tiles: Tensor, tiling: Tiling, prompts: PromptEmbeddings, at_once: int
    ) -> Pending:
        """Starts scoring one large photo in tiles, as start does for a batch.

        The whole photo [3, H, W] is used for adaptation and the global score; the overlapping tiles [T, 3, H, W] give
        one map at their resolution. Where tiles overlap they are averaged, with weights that fall towards their edges,
        so that no seam shows. at_once: tiles per forward pass.
        """
        adapted = self._adapt_prompts(self.encoder.encode_images(whole[None]).embedding, [prompts])
        window = to_device(_window(tiling.tile), self.encoder.device)
        fingerprint = fingerprint_pixels(to_device(whole[None], self.encoder.device))
        layers = 3 + len(prompts.defects) + (prompts.peers.count if prompts.peers else 0)
        blended = torch.zeros(layers, *tiling.grid, device=window.device)
        weight = torch.zeros(tiling.grid, device=window.device)
        places = iter(tiling.places)
        for some in tiles.split(at_once):
            sides = adapted.sides.expand(len(some), -1, -1)
            found = self._score_patches(
                self.features(some), sides, [prompts] * len(some), fingerprint.expand(len(some))
            )
            patches = found.unflatten(2, tiling.tile)
            for part, (top, left) in zip(patches, places, strict=False):
                here = (slice(top, top + tiling.tile[0]), slice(left, left + tiling.tile[1]))
                blended[(slice(None), *here)] += part * window
                weight[here] += window
        return self._assemble(adapted, (blended / weight)[None], [prompts])

    def _adapt_prompts(self, embedding: Tensor, prompts: Sequence[PromptEmbeddings]) -> _Adapted:
        """Adapts the prompts to the class embeddings [B, D]."""
        batch = _gather(prompts, self.encoder.device)
        similarities = (batch.embeddings @ embedding[:, :, None])[..., 0]
        weights = adapt(similarities, batch, self._method)
        sides = prototypes(weights, batch)
        kept = torch.stack([((weights > 0) & side).sum(1) for side in batch.sides], dim=1)
        return _Adapted(similarities, weights, sides, kept, self._anomalous_share(embedding[:, None], sides)[:, 0])

    def _score_patches(
        self, features: Features, sides: Tensor, prompts: Sequence[PromptEmbeddings], fingerprints: Tensor
    ) -> Tensor:
        """Computes the layers of each patch, [B, 3 + K + M, P].

        They are the anomalous share m, the distances R to the references and D to the peers, the cosines with the K
        defects, and the distances to the M single peers.
        """
        local = features.local
        shares = torch.stack([self._anomalous_share(level, sides) for level in local]).mean(0)
        compared = features.image.compared_tokens
        distances = _reference_distances(self._tokens_of(self._reference_levels, compared), prompts)
        to_peers, to_each = self._peer_distances(compared, prompts, fingerprints)
        defects = to_device(_pad([item.defect_embeddings for item in prompts]), self.encoder.device)
        cosines = defects @ _mean_direction(local).transpose(1, 2)
        return torch.cat([shares[:, None], distances[:, None], to_peers[:, None], cosines, to_each], dim=1)

    def _tokens_of(self, levels: tuple[int, ...], compared: Tensor) -> Tensor:
        """Selects the given levels of the compared tokens [C, B, P, W]."""
        if levels == self._compared_levels:
            return compared
        chosen = [compared[self._compared_levels.index(level)] for level in levels]
        return torch.stack(chosen) if chosen else compared[:0]

    def _peer_distances(
        self, compared: Tensor, prompts: Sequence[PromptEmbeddings], fingerprints: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns D of each image to its class's peers, [B, P], and its distances to each peer, [B, M, P].

        They are 0 and infinite for an image without peers. compared: [C, B, P, W].
        """
        memories = dict.fromkeys(item.peers for item in prompts if item.peers is not None)
        most = max((memory.count for memory in memories), default=0)
        distances = torch.zeros(compared.shape[1:3], device=compared.device)
        each = torch.full((compared.shape[1], most, compared.shape[2]), torch.inf, device=compared.device)
        if not memories:
            return distances, each
        if self._peers is None:
            raise ValueError("the prompts come with peers, but the detector was made without")
        tokens = self._neighbourhoods(self._tokens_of(self._peer_levels, compared))
        for memory in memories:
            images = _images_of([item.peers is memory for item in prompts], compared.device)
            found, to_each = peer_distance(tokens[:, images], fingerprints[images], memory, self._peers.share)
            distances[images] = found
            each[images, : memory.count] = to_each.transpose(1, 2)
        return distances, each

    def _assemble(self, adapted: _Adapted, patches: Tensor, prompts: Sequence[PromptEmbeddings]) -> Pending:
        """Combines patches [B, 3 + K + M, gh, gw], with layers as in _score_patches, into detections."""
        w, score_global = self._method.local_weight, adapted.score_global
        grid = _mean_filter(patches[:, :1])[:, 0]
        top = min(self._method.local_top_k, grid[0].numel())
        score_local = grid.flatten(1).topk(top).values.mean(1)
        score = (1 - w) * score_global + w * score_local
        distances = patches[:, 1]
        score_reference = distances.flatten(1).amax(1)
        referenced = to_device(torch.tensor([item.memory is not None for item in prompts]), score.device)
        score = torch.where(referenced, (score + score_reference) / 2, score)
        score, score_peers, maps = self._join_peers(score, grid, distances, patches[:, 2], referenced, prompts)
        defects = max(len(item.defects) for item in prompts)
        defect_grid, to_each = patches[:, 3 : 3 + defects], patches[:, 3 + defects :]
        if max(defect_grid.shape[2:]) > _MOST_DEFECT_PATCHES:
            rows, columns = (min(side, _MOST_DEFECT_PATCHES) for side in defect_grid.shape[2:])
            defect_grid = F.adaptive_avg_pool2d(defect_grid, (rows, columns))
        nearest = to_each.argmin(1).short() if to_each.shape[1] else torch.zeros_like(grid, dtype=torch.int16)
        scores = torch.stack([score, score_global, score_local, score_reference, score_peers], dim=1)
        of_prompts = [adapted.kept, adapted.weights, adapted.similarities]
        found = to_host([scores, *of_prompts, maps, defect_grid, patches[:, 2].contiguous(), nearest])
        return partial(_read_detections, found, prompts)

    def _join_peers(
        self,
        score: Tensor,
        grid: Tensor,
        references: Tensor,
        distances: Tensor,
        referenced: Tensor,
        prompts: Sequence[PromptEmbeddings],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Joins scores and maps with those of the peers. Returns final score, the part of the peers in it, and map.

        score: [B], references included. grid: the map of language [B, gh, gw]. references, distances: R and D, of the
        same shape. referenced: [B], which images have references.
        """
        if self._peers is None or not any(item.peers for item in prompts):
            return score, torch.zeros_like(score), grid + references
        fences = [item.peers.calibration if item.peers else None for item in prompts]
        numbers = [(f.distance, f.score, f.peak) for f in (fence or _UNFENCED for fence in fences)]
        c, f_score, f_peak = to_device(torch.tensor(numbers), score.device).T
        compared = to_device(torch.tensor([item.peers is not None for item in prompts]), score.device)
        fenced = to_device(torch.tensor([fence is not None for fence in fences]), score.device)
        value, u = image_value(distances.flatten(1)), self._peers.weight
        language = torch.where(referenced[:, None, None], (grid + references) / 2, grid)
        maps = calibrate(combine(language, distances, c[:, None, None], u), f_peak[:, None, None])
        maps = torch.where(fenced[:, None, None], maps, language)
        maps = torch.where(compared[:, None, None], maps, grid + references)
        joined = calibrate(combine(score, value, c, u), f_score)
        return torch.where(fenced, joined, score), torch.where(fenced, value / (value + c), value), maps

    def _anomalous_share(self, embeddings: Tensor, sides: Tensor) -> Tensor:
        """softmax(<x, t_N> / tau, <x, t_A> / tau)[anomalous] of embeddings [B, P, D] and sides [B, 2, D]: [B, P]."""
        logits = embeddings @ (self.encoder.logit_scale * sides).transpose(1, 2)  # the sides are few
        return logits.softmax(-1)[..., 1]


def _read_detections(
    found: Callable[[], Sequence[NDArray[Any]]], prompts: Sequence[PromptEmbeddings]
) -> list[Detection]:
    """Builds the detections of a batch.

    found: scores [B, 5], kept prompts per side [B, 2], weights and similarities [B, P], maps [B, gh, gw], cosines with
    the defects [B, K, gh, gw], distances to the peers and the nearest peer [B, gh, gw].
    """
    scores, kept, weights, similarities, grids, defect_grids, distances, nearest = found()
    numbers, counts = scores.tolist(), kept.tolist()
    return [
        Detection(
            score=numbers[i][0],
            score_global=numbers[i][1],
            score_local=numbers[i][2],
            score_reference=None if item.memory is None else numbers[i][3],
            shots=0 if item.memory is None else item.memory.shots,
            score_peers=None if item.peers is None else numbers[i][4],
            peers=0 if item.peers is None else item.peers.count,
            grid=grids[i],
            peer_distances=None if item.peers is None else distances[i],
            nearest_peer=None if item.peers is None else nearest[i],
            defect_grid=defect_grids[i, : len(item.defects)],
            kept=weights[i, : len(item.ensemble.prompts)] > 0,
            kept_normal=counts[i][0],
            kept_anomalous=counts[i][1],
            explanation=explain(item.ensemble.prompts, weights[i], similarities[i]),
        )
        for i, item in enumerate(prompts)
    ]


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


def _compared_levels(blocks: int, section: str, options: References | Peers | None) -> tuple[int, ...]:
    """Returns the blocks whose patches are compared: those that a section of the job names, else the defaults.

    Defaults: the middle block for references, and those at one and two thirds of the depth for peers. Without the
    section there are none.
    """
    if options is None:
        return ()
    levels: Sequence[int] | None = options.levels
    if levels is None:
        levels = (blocks // 2 - 1,) if section == "references" else (blocks // 3, 2 * blocks // 3)
    resolved = tuple(sorted({level + blocks if level < 0 else level for level in levels}))
    if not all(0 <= level < blocks for level in resolved):
        raise ModelError(f"{section}.levels {list(levels)} must name blocks 0 to {blocks - 1} of this model")
    return resolved


def _reference_distances(tokens: Tensor, prompts: Sequence[PromptEmbeddings]) -> Tensor:
    """Returns R of each image to its class's memory, [B, P]; 0 where it has none. tokens: [L, B, P, W]."""
    distances = torch.zeros(tokens.shape[1:3], device=tokens.device)
    for memory in dict.fromkeys(item.memory for item in prompts if item.memory is not None):
        images = _images_of([item.memory is memory for item in prompts], tokens.device)
        distances[images] = reference_distance(tokens[:, images], memory)
    return distances


def _images_of(chosen: Sequence[bool], device: torch.device) -> Tensor:
    """Returns the numbers of the chosen images, on the device."""
    return to_device(torch.tensor([number for number, one in enumerate(chosen) if one]), device)


def _gather(prompts: Sequence[PromptEmbeddings], device: torch.device) -> PromptBatch:
    """Pads the prompts of each distinct class once, then picks one row per image."""
    distinct = {id(item): item for item in prompts}
    places = {key: place for place, key in enumerate(distinct)}
    rows = torch.tensor([places[id(item)] for item in prompts])
    embeddings = _pad([item.embeddings for item in distinct.values()])
    anomalous = _pad([item.is_anomalous for item in distinct.values()])
    valid = _pad([torch.ones_like(item.is_anomalous) for item in distinct.values()])
    rows, embeddings, anomalous, valid = (to_device(part, device) for part in (rows, embeddings, anomalous, valid))
    return PromptBatch(embeddings[rows], anomalous[rows], valid[rows])


def _pad(parts: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def _mean_direction(levels: Tensor) -> Tensor:
    """Returns the normalised mean [B, P, D] of normalised patches [L, B, P, D]."""
    return levels[0] if len(levels) == 1 else F.normalize(levels.mean(0), dim=-1)


def _mean_filter(grid: Tensor) -> Tensor:
    """Filters [B, 1, gh, gw] by a 3x3 mean; at the edges over the patches that exist."""
    return F.avg_pool2d(grid, 3, stride=1, padding=1, count_include_pad=False)


def _window(tile: tuple[int, int]) -> Tensor:
    """Returns the weight of each patch of a tile: it falls linearly from the middle to the edges, and is never 0."""
    rows, columns = (torch.arange(1.0, side + 1).minimum(torch.arange(float(side), 0.0, -1.0)) for side in tile)
    return rows[:, None] * columns
