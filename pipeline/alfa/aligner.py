"""The training-free aligner: embeds patches in the space of texts (ALFA, reconstructed from its abstract).

CLIP aligns only its class token with text. `value` applies to each patch the map that makes the class token. `ridge`
fits, for each image, a linear map from patch tokens to the class embeddings of windows. `raw` projects the patch tokens
unchanged.
Formulas: pipeline/alfa/README.md, "Fine-grained aligner"; the paper is arXiv 2404.09654.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.alfa.device import to_device
from pipeline.alfa.encoder import Encoder, ImageFeatures

_SEQUENCES_AT_ONCE = 2048
_WINDOWS = (2, 3)


def align(features: ImageFeatures, encoder: Encoder, aligner: str, ridge_lambda: float) -> Tensor:
    """Computes the local embeddings of the chosen levels, [L, B, P, D], normalised, float32."""
    tokens = features.values if aligner == "value" else features.tokens
    if tokens is None:
        raise ValueError(f"features were made for another aligner than {aligner}")
    if aligner != "ridge":
        return encoder.project(tokens)
    windows = [to_device(window, encoder.device) for window in window_patches(encoder.grid)]
    targets = torch.cat([features.embedding[:, None], _window_embeddings(features.embedded, windows, encoder)], dim=1)
    return torch.stack([ridge(level, windows, targets, ridge_lambda) for level in tokens])


def ridge(tokens: Tensor, windows: list[Tensor], targets: Tensor, ridge_lambda: float) -> Tensor:
    """Maps patches by the ridge regression of region embeddings G on mean region tokens L: [B, P, D], normalised.

    tokens: [B, P, W]; windows: patch indices of the regions besides the whole image, by size; targets: G [B, R, D], the
    whole image first. x W with W = (L^T L + lambda I)^-1 L^T G, solved in the dual (regions x regions), float32.
    """
    means = [tokens.mean(1, keepdim=True), *(tokens[:, index].mean(2) for index in windows)]
    regions = torch.cat(means, dim=1)
    gram = regions @ regions.transpose(1, 2)
    gram = gram + ridge_lambda * torch.eye(gram.shape[1], device=gram.device)
    # The matrix is positive definite. The _ex variant does not raise for NaN, which becomes an error row.
    factor, _ = torch.linalg.cholesky_ex(gram)
    return F.normalize(tokens @ regions.transpose(1, 2) @ torch.cholesky_solve(targets, factor), dim=-1)


def window_patches(grid: tuple[int, int]) -> list[Tensor]:
    """Lists the patches of all 2x2 windows [R2, 4] and 3x3 windows [R3, 9] of a grid (rows, columns), stride 1."""
    numbers = torch.arange(grid[0] * grid[1]).view(grid)
    return [
        numbers.unfold(0, size, 1).unfold(1, size, 1).reshape(-1, size * size) for size in _WINDOWS if min(grid) >= size
    ]


def _window_embeddings(embedded: Tensor, windows: list[Tensor], encoder: Encoder) -> Tensor:
    """Computes the class embedding of each window's tokens with the class token, by the same ViT: [B, R, D].

    It takes some images at a time, so that memory does not grow with the batch.
    """
    parts = []
    for index in windows:
        images = embedded.split(max(1, _SEQUENCES_AT_ONCE // len(index)))
        parts.append(torch.cat([_encode_windows(some, index, encoder) for some in images]))
    return torch.cat(parts, dim=1)


def _encode_windows(embedded: Tensor, index: Tensor, encoder: Encoder) -> Tensor:
    patches = embedded[:, 1:][:, index]
    classes = embedded[:, None, :1].expand(-1, len(index), -1, -1)
    sequences = torch.cat([classes, patches], dim=2)
    return encoder.encode_tokens(sequences.flatten(0, 1)).view(*sequences.shape[:2], -1)
