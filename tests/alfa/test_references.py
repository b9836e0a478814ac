"""Few-shot: memory and distances, by hand and against a slow reference."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.alfa import Detector, Encoder, ModelError, ReferenceMemory
from pipeline.alfa import patches as module
from pipeline.alfa.references import reference_distance, remember
from schemas.job import Method, References
from tests.alfa.conftest import ensemble, random_pixels


def detector_of(encoder: Encoder, *levels: int) -> Detector:
    return Detector(encoder, Method(aligner="raw"), References(images="train", levels=levels or None))


def test_distances_by_hand() -> None:
    """Known patches look along x and y; the image's along x, along -x, and between x and y."""
    memory = remember([torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])])
    patches = torch.tensor([[[[5.0, 0.0], [-1.0, 0.0], [1.0, 1.0]]]])
    expected = [0.0, (1 - 0) / 2, (1 - 2**-0.5) / 2]
    np.testing.assert_allclose(reference_distance(patches, memory)[0], expected, atol=1e-4)


@pytest.mark.parametrize("at_once", [1, 100, 1 << 24])
def test_distances_are_those_of_a_slow_reference_whatever_the_piece(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(module, "_COSINES_AT_ONCE", at_once)
    torch.manual_seed(0)
    known = [torch.randn(2, 5, 8) for _ in range(3)]
    images = torch.randn(2, 4, 6, 8)
    found = reference_distance(images, remember(known))
    for b in range(4):
        for p in range(6):
            nearest = [
                min(
                    (1 - torch.cosine_similarity(images[level, b, p], image[level, r], dim=0).item()) / 2
                    for image in known
                    for r in range(5)
                )
                for level in range(2)
            ]
            assert found[b, p].item() == pytest.approx(sum(nearest) / 2, abs=1e-3)


def test_a_reference_image_is_at_distance_0_and_others_are_not(encoder: Encoder) -> None:
    detector = detector_of(encoder, 1, -1)
    pixels = random_pixels(3, (64, 64))
    memory = detector.remember(pixels[:2].split(1))
    assert memory.tokens.shape == (2, 32, 32) and memory.shots == 2
    prompts = replace(detector.embed(ensemble("nut", 4, ("crack",))), memory=memory)
    found = detector.detect(pixels, [prompts] * 3)
    assert [detection.score_reference for detection in found[:2]] == pytest.approx([0, 0], abs=1e-6)
    assert found[2].score_reference is not None and found[2].score_reference > 1e-3


def test_map_and_score_are_those_of_language_and_references_together(encoder: Encoder) -> None:
    """map = m + R and S_few = (S + max R) / 2, in a batch in which some classes have references and some have none."""
    detector = detector_of(encoder, 2)
    pixels = random_pixels(4, (64, 64))
    plain = [detector.embed(ensemble(name, 4, ("crack",))) for name in ("nut", "pill")]
    memory = detector.remember(random_pixels(2, (64, 64), seed=5).split(1))
    few = replace(plain[1], memory=memory)
    zero_shot = detector.detect(pixels, [plain[0], plain[1], plain[0], plain[1]])
    found = detector.detect(pixels, [plain[0], few, plain[0], few])
    for number in (0, 2):
        assert (found[number].shots, found[number].score_reference) == (0, None)
        assert found[number].score == pytest.approx(zero_shot[number].score, abs=1e-6)
    tokens = detector.features(pixels).image.compared_tokens
    for number in (1, 3):
        distances = reference_distance(tokens[:, number : number + 1], memory).view(4, 4).numpy()
        np.testing.assert_allclose(found[number].grid, zero_shot[number].grid + distances, atol=1e-5)
        assert found[number].score_local == pytest.approx(zero_shot[number].score_local, abs=1e-6)
        assert found[number].score == pytest.approx((zero_shot[number].score + distances.max()) / 2, abs=1e-5)
        assert found[number].shots == 2


def test_the_memory_of_the_others() -> None:
    memory = ReferenceMemory(torch.arange(6.0).view(1, 6, 1).half(), (2, 1, 3))
    others = memory.without(1)
    assert others.tokens.flatten().tolist() == [0, 1, 3, 4, 5] and others.patches == (2, 3)
    with pytest.raises(ValueError, match="no others"):
        memory.without(0).without(0).without(0)
    assert torch.equal(pickle.loads(pickle.dumps(memory)).tokens, memory.tokens)


@pytest.mark.parametrize("levels", [(4,), (-5,)])
def test_levels_that_the_model_does_not_have_are_refused(encoder: Encoder, levels: Any) -> None:
    with pytest.raises(ModelError, match=r"references.levels .* blocks 0 to 3"):
        detector_of(encoder, *levels)
