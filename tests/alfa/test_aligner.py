"""Local embeddings against plain loops and numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.alfa import Encoder
from pipeline.alfa.aligner import align, ridge, window_patches
from tests.alfa.conftest import random_pixels


@pytest.mark.parametrize("kind", ["square", "scaled", "wide"])
def test_value_is_a_plain_loop_over_heads(kind: str, request: pytest.FixtureRequest, load: Any) -> None:
    encoder: Encoder = load(request.getfixturevalue(kind))
    pixels = random_pixels(2, encoder.preprocess.size)
    features = encoder.encode_images(pixels, (1, 3), 3)
    found = align(features, encoder, "value", 1.0)

    visual, expected = encoder._visual, []
    with torch.no_grad():
        x = features.embedded.clone()
        for number, block in enumerate(visual.transformer.resblocks):
            if number == 1:
                y = x.clone()
            if number >= 1:
                normed, width = block.ln_1(x), x.shape[-1]
                heads = []
                for head in range(4):
                    rows = slice(2 * width + head * 8, 2 * width + (head + 1) * 8)
                    v = normed @ block.attn.in_proj_weight[rows].T + block.attn.in_proj_bias[rows]
                    heads.append(torch.softmax(v @ v.transpose(1, 2) / 8**0.5, dim=-1) @ v)
                output = block.attn.out_proj
                update = torch.cat(heads, dim=-1) @ output.weight.T + output.bias
                y = y + (update * block.ls_1.gamma if kind == "scaled" else update)
            x = block(x)
            if number in (1, 3):
                expected.append(F.normalize(visual.ln_post(y[:, 1:]) @ visual.proj, dim=-1))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)
    assert found.dtype == torch.float32


def test_raw_is_the_last_norm_and_projection(encoder: Encoder) -> None:
    features = encoder.encode_images(random_pixels(2, (64, 64)), (0, 3))
    with torch.no_grad():
        expected = F.normalize(encoder._visual.ln_post(features.tokens) @ encoder._visual.proj, dim=-1)
    torch.testing.assert_close(align(features, encoder, "raw", 1.0), expected)


@pytest.mark.parametrize("ridge_lambda", [0.5, 10.0])
def test_ridge_is_least_squares_on_the_augmented_system(wide: Any, load: Any, ridge_lambda: float) -> None:
    encoder: Encoder = load(wide)
    features = encoder.encode_images(random_pixels(2, (48, 80)), (3,))
    found = align(features, encoder, "ridge", ridge_lambda)[0]

    rows, columns = encoder.grid
    regions = [list(range(rows * columns))]
    for size in (2, 3):
        for top in range(rows - size + 1):
            for left in range(columns - size + 1):
                regions.append([(top + i) * columns + left + j for i in range(size) for j in range(size)])
    for image in range(2):
        means = np.stack([features.tokens[0, image, region].numpy().mean(0) for region in regions]).astype(np.float64)
        targets = [features.embedding[image]]
        for region in regions[1:]:
            tokens = features.embedded[image, [0, *(patch + 1 for patch in region)]]
            targets.append(encoder.encode_tokens(tokens[None])[0])
        width = means.shape[1]
        augmented = np.concatenate([means, ridge_lambda**0.5 * np.eye(width)])
        right = np.concatenate([torch.stack(targets).numpy(), np.zeros((width, encoder.embedding_dim))])
        solution = np.linalg.lstsq(augmented, right, rcond=None)[0]
        local = features.tokens[0, image].numpy() @ solution
        local /= np.linalg.norm(local, axis=1, keepdims=True)
        np.testing.assert_allclose(found[image].numpy(), local, atol=1e-3)


def test_ridge_does_not_depend_on_how_the_work_is_cut(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    features = encoder.encode_images(random_pixels(5, (64, 64)), (3,))
    whole = align(features, encoder, "ridge", 1.0)
    monkeypatch.setattr("pipeline.alfa.aligner._SEQUENCES_AT_ONCE", 1)
    torch.testing.assert_close(align(features, encoder, "ridge", 1.0), whole, atol=1e-4, rtol=0)


def test_windows_that_do_not_fit_the_grid_are_left_out() -> None:
    assert [index.shape for index in window_patches((3, 5))] == [(8, 4), (3, 9)]
    assert window_patches((2, 2))[0].tolist() == [[0, 1, 2, 3]] and window_patches((1, 4)) == []
    tokens, targets = torch.randn(1, 4, 8), torch.randn(1, 1, 6)
    assert ridge(tokens, [], targets, 1.0).shape == (1, 4, 6)
