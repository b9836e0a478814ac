"""The input of a detector for a class, and its output for an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.alfa.encoder import ImageFeatures
from pipeline.alfa.explain import Evidence
from pipeline.alfa.peers import PeerMemory
from pipeline.alfa.references import ReferenceMemory
from schemas.prompts import PromptEnsemble


@dataclass(frozen=True, eq=False)
class PromptEmbeddings:
    """The prompts of a class, encoded once; it can be pickled, to share it with all actors.

    embeddings: [P, D], normalised, float32, CPU; is_anomalous: [P], bool; defects: the K names of described defects;
    defect_embeddings: [K, D], the normalised mean of the prompts that name the defect. memory: known-good images that
    the class's photos are compared with (few-shot); peers: photos of the night that they are compared with.
    """

    ensemble: PromptEnsemble
    embeddings: Tensor
    is_anomalous: Tensor
    defects: tuple[str, ...]
    defect_embeddings: Tensor
    memory: ReferenceMemory | None = None
    peers: PeerMemory | None = None


@dataclass(frozen=True, eq=False)
class Features:
    """The features of a batch of B images, which do not depend on prompts.

    local: aligned patches [L, B, P, D], normalised. fingerprints: of the pixels, [B], int64.
    """

    image: ImageFeatures
    local: Tensor
    fingerprints: Tensor


@dataclass(frozen=True)
class Detection:
    """The result for one image.

    score, score_global, score_local: 0 to 1, raw. grid: anomaly map on the patch grid [gh, gw], float32, probabilities.
    defect_grid: cosine of each patch with each defect [K, gh, gw], float32, averaged to at most 64 patches per side.
    kept: [P], whether adaptation has kept each prompt, in the order of the ensemble.

    shots: number of reference images that it was compared with. With references, score_reference is the distance of the
    farthest patch, 0 to 1, and the distances are added to the grid, which then ranges from 0 to 2.

    peers: number of photos of the night that it was compared with. With peers, score and grid range from 0 to 1, and
    0.5 is the fence of the class. score_peers is the part of the peers in the score; peer_distances [gh, gw] is D of
    each patch; nearest_peer [gh, gw] is the number of the most similar peer. If the peers are not calibrated yet, score
    and grid are those without peers, and score_peers is v.
    """

    score: float
    score_global: float
    score_local: float
    score_reference: float | None
    shots: int
    score_peers: float | None
    peers: int
    grid: NDArray[np.float32]
    peer_distances: NDArray[np.float32] | None
    nearest_peer: NDArray[np.int16] | None
    defect_grid: NDArray[np.float32]
    kept: NDArray[np.bool_]
    kept_normal: int
    kept_anomalous: int
    explanation: tuple[Evidence, ...]
