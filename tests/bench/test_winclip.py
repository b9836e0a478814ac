"""Tests the bench's WinCLIP against masks in attention, a hand-made grid and plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.alfa import Detector, Encoder, PromptEmbeddings, load_encoder, locate_weights
from pipeline.alfa.aligner import window_patches
from pipeline.images import decode_image
from pipeline.scoring import to_tensor
from schemas.job import Method, Model
from tests.alfa.conftest import ensemble
from tests.bench.winclip import detect, embed_windows, spread

PHOTOS = sorted((Path(__file__).parents[2] / "infra/demo/images/hazelnut/test/colour").iterdir())[:2]
ROWS, COLUMNS = 16, 16


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    model = Model(device="cpu")
    return load_encoder(model, locate_weights(model))


@pytest.fixture(scope="module")
def prompts(encoder: Encoder) -> PromptEmbeddings:
    return Detector(encoder, Method(aligner="raw")).embed(ensemble("hazelnut", 3, ("hole",)))


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    decoded = (
        decode_image(path.read_bytes(), size=(224, 224), interpolation="bicubic", max_pixels=10_000_000)
        for path in PHOTOS
    )
    return to_tensor([photo.pixels for photo in decoded])


def test_a_window_alone_has_the_embedding_of_one_masked_in_attention(encoder: Encoder, pixels: Tensor) -> None:
    embedded = encoder.encode_images(pixels[:1], (0,)).embedded
    seen = []
    for windows in window_patches(encoder.grid):
        some = windows[::20]
        for found, window in zip(embed_windows(embedded, some, encoder, 7)[0], some, strict=True):
            mask = torch.full((1 + ROWS * COLUMNS,) * 2, -torch.inf)
            mask[:, [0, *(1 + window).tolist()]] = 0
            with torch.no_grad():
                x = embedded
                for block in encoder._visual.transformer.resblocks:
                    x = block(x, attn_mask=mask)
                expected = F.normalize(encoder._visual.ln_post(x[0, 0]) @ encoder._visual.proj, dim=-1)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
            seen.append(found)
    assert torch.pdist(torch.stack(seen)).min() > 1e-3  # windows differ by far more than what is let pass


def test_a_patch_has_the_harmonic_mean_of_the_windows_that_hold_it() -> None:
    windows = window_patches((3, 3))[0]
    found = spread(torch.tensor([[0.1, 0.2, 0.4, 0.8]]), windows, 9).view(3, 3)
    centre = 4 / (10 + 5 + 2.5 + 1.25)
    expected = [[0.1, 2 / (10 + 5), 0.2], [2 / (10 + 2.5), centre, 2 / (5 + 1.25)], [0.4, 2 / (2.5 + 1.25), 0.8]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_maps_and_scores_are_those_of_plain_loops(encoder: Encoder, prompts: PromptEmbeddings, pixels: Tensor) -> None:
    found = detect(pixels, prompts, encoder, 100)
    embedded = encoder.encode_images(pixels, (0,))
    texts, anomalous = prompts.embeddings.double().numpy(), prompts.is_anomalous.numpy()
    sides = [texts[side].mean(0) / np.linalg.norm(texts[side].mean(0)) for side in (~anomalous, anomalous)]

    def score(embedding: Tensor) -> float:
        normal, defective = (np.exp(encoder.logit_scale * embedding.double().numpy() @ side) for side in sides)
        return float(defective / (normal + defective))

    for image in range(2):
        whole = score(embedded.embedding[image])
        inverse = np.full((ROWS, COLUMNS), 1 / whole)
        passes = 0
        for size in (2, 3):
            held: list[list[list[float]]] = [[[] for _ in range(COLUMNS)] for _ in range(ROWS)]
            for top in range(ROWS - size + 1):
                line = [
                    [(top + i, left + j) for i in range(size) for j in range(size)]
                    for left in range(COLUMNS - size + 1)
                ]
                tokens = [[0, *(1 + row * COLUMNS + column for row, column in places)] for places in line]
                embeddings = encoder.encode_tokens(embedded.embedded[image, tokens])
                for places, embedding in zip(line, embeddings, strict=True):
                    passes += 1
                    for row, column in places:
                        held[row][column].append(1 / score(embedding))
            inverse += [[float(np.mean(values)) for values in row] for row in held]
        assert passes == 15 * 15 + 14 * 14
        np.testing.assert_allclose(found.maps[image].numpy(), 3 / inverse, atol=1e-5)
        assert found.scores[image].item() == pytest.approx(whole, abs=1e-5)
    assert found.maps.std() > 1e-3
