"""The whole detector: batches, levels, scores, explanation."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.alfa import Detection, Detector, Encoder, ModelError, PromptEmbeddings
from pipeline.alfa.detector import _mean_filter
from pipeline.alfa.explain import explain
from schemas.job import Method
from tests.alfa.conftest import ensemble, random_pixels

ENSEMBLES = [ensemble("nut", 4, ("crack", "hole")), ensemble("pill", 9, ("stain",)), ensemble("tile", 5, ())]


def assert_same(one: Detection, other: Detection, atol: float = 1e-5) -> None:
    for field in ("score", "score_global", "score_local", "grid", "defect_grid"):
        np.testing.assert_allclose(getattr(one, field), getattr(other, field), atol=atol)
    assert (one.kept_normal, one.kept_anomalous) == (other.kept_normal, other.kept_anomalous)
    assert np.array_equal(one.kept, other.kept)
    assert {x.prompt for x in one.explanation} == {x.prompt for x in other.explanation}


@pytest.mark.parametrize("aligner", ["value", "ridge", "raw"])
@pytest.mark.parametrize("adaptation", ["none", "mean", "rank", "interval", "soft"])
def test_mixed_classes_in_a_batch_are_as_one_image_at_a_time(encoder: Encoder, aligner: str, adaptation: str) -> None:
    detector = Detector(encoder, Method.model_validate({"adaptation": adaptation, "aligner": aligner}))
    classes = [detector.embed(prompts) for prompts in ENSEMBLES]
    pixels = random_pixels(7, (64, 64))
    prompts = [classes[i % 3] for i in range(7)]
    together = detector.detect(pixels, prompts)
    for i, detection in enumerate(together):
        # ridge solves in float32, and batches round differently
        alone = detector.detect(pixels[i : i + 1], [prompts[i]])[0]
        assert_same(detection, alone, atol=1e-3 if aligner == "ridge" else 1e-5)
        assert detection.defect_grid.shape == (len(prompts[i].defects), 4, 4)
        sides = np.array([prompt.side == "anomalous" for prompt in prompts[i].ensemble.prompts])
        assert (detection.kept[~sides].sum(), detection.kept[sides].sum()) == (
            detection.kept_normal,
            detection.kept_anomalous,
        )


def test_deterministic_and_order_free(encoder: Encoder) -> None:
    detector = Detector(encoder, Method(aligner="value", levels=(-1, -2)))
    prompts = [detector.embed(ENSEMBLES[0])] * 4
    pixels = random_pixels(4, (64, 64))
    first, second = detector.detect(pixels, prompts), detector.detect(pixels, prompts)
    for one, other in zip(first, second, strict=True):
        assert one.score == other.score and one.explanation == other.explanation
        assert np.array_equal(one.grid, other.grid) and np.array_equal(one.defect_grid, other.defect_grid)
    for one, other in zip(first, reversed(detector.detect(pixels.flip(0), prompts)), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize("kind", ["square", "wide"])
def test_one_and_many_images(kind: str, count: int, request: pytest.FixtureRequest, load: Any) -> None:
    encoder: Encoder = load(request.getfixturevalue(kind))
    detector = Detector(encoder, Method(aligner="value"))
    found = detector.detect(random_pixels(count, encoder.preprocess.size), [detector.embed(ENSEMBLES[0])] * count)
    assert len(found) == count
    for detection in found:
        assert detection.grid.shape == encoder.grid and detection.grid.dtype == np.float32
        assert detection.defect_grid.shape == (2, *encoder.grid) and detection.defect_grid.dtype == np.float32
        assert np.abs(detection.defect_grid).max() <= 1 + 1e-5
        assert isinstance(detection.score, float) and 0 <= detection.score <= 1
        assert detection.score == pytest.approx((detection.score_global + detection.score_local) / 2, abs=1e-6)


def test_equal_keys_are_equal_features(encoder: Encoder) -> None:
    pixels = random_pixels(2, (64, 64))
    first = Detector(encoder, Method(aligner="value"))
    prompts = [first.embed(ENSEMBLES[0])] * 2
    same = Detector(encoder, Method(aligner="value", adaptation="none", local_weight=0.2, ridge_lambda=3.0))
    assert same.features_key == first.features_key
    for one, other in zip(
        same.score_features(first.features(pixels), prompts), same.detect(pixels, prompts), strict=True
    ):
        assert_same(one, other)
    others = [
        Detector(encoder, Method(aligner="raw")),
        Detector(encoder, Method(aligner="ridge")),
        Detector(encoder, Method(aligner="ridge", ridge_lambda=3.0)),
        Detector(encoder, Method(aligner="value", value_depth=1)),
        Detector(encoder, Method(aligner="value", levels=(-1, -2))),
    ]
    assert len({first.features_key, *(detector.features_key for detector in others)}) == 6


def detect_one(encoder: Encoder, **options: Any) -> Detection:
    detector = Detector(encoder, Method.model_validate({"aligner": "raw", **options}))
    return detector.detect(random_pixels(1, (64, 64)), [detector.embed(ENSEMBLES[0])])[0]


def test_levels_are_averaged(encoder: Encoder) -> None:
    grids = {levels: detect_one(encoder, levels=levels).grid for levels in [(1,), (-1,), (1, -1), (-3, 3)]}
    np.testing.assert_allclose(grids[1, -1], (grids[(1,)] + grids[(-1,)]) / 2, atol=1e-6)
    np.testing.assert_array_equal(grids[-3, 3], grids[1, -1])


def test_local_score_is_the_mean_of_the_highest_patches(encoder: Encoder) -> None:
    for count in (1, 3, 16, 400):
        detection = detect_one(encoder, local_top_k=count, local_weight=0.25)
        assert detection.score_local == pytest.approx(np.sort(detection.grid.ravel())[::-1][:count].mean(), abs=1e-6)
        expected = 0.75 * detection.score_global + 0.25 * detection.score_local
        assert detection.score == pytest.approx(expected, abs=1e-6)


def test_global_score_and_map_by_hand_without_adaptation(encoder: Encoder) -> None:
    detector = Detector(encoder, Method(aligner="raw", adaptation="none"))
    prompts, pixels = detector.embed(ENSEMBLES[1]), random_pixels(1, (64, 64))
    detection = detector.detect(pixels, [prompts])[0]
    features = encoder.encode_images(pixels, (3,))
    sides = [prompts.embeddings[prompts.is_anomalous == side].mean(0) for side in (False, True)]
    normal, anomalous = (side / side.norm() for side in sides)

    def share(x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(encoder.logit_scale * (x @ anomalous - x @ normal))

    assert detection.score_global == pytest.approx(float(share(features.embedding)[0]), abs=1e-5)
    patches = share(encoder.project(features.tokens)[0, 0]).view(4, 4)
    assert detection.grid[0, 0] == pytest.approx(float(patches[:2, :2].mean()), abs=1e-5)
    assert detection.grid[2, 1] == pytest.approx(float(patches[1:4, 0:3].mean()), abs=1e-5)


def test_mean_filter_averages_real_patches_only() -> None:
    grid = torch.arange(12.0).view(1, 1, 3, 4)
    found = _mean_filter(grid)[0, 0]
    assert found[0, 0] == (0 + 1 + 4 + 5) / 4 and found[1, 1] == 5 and found[2, 1] == (4 + 5 + 6 + 8 + 9 + 10) / 6


def test_embeddings_of_prompts_and_defects(encoder: Encoder) -> None:
    prompts = Detector(encoder, Method(aligner="raw")).embed(ENSEMBLES[0])
    assert prompts.defects == ("crack", "hole") and prompts.is_anomalous.tolist() == [False] * 4 + [True] * 5
    expected = prompts.embeddings[5:7].mean(0)
    torch.testing.assert_close(prompts.defect_embeddings[0], expected / expected.norm())
    copy: PromptEmbeddings = pickle.loads(pickle.dumps(prompts))
    assert torch.equal(copy.embeddings, prompts.embeddings) and copy.ensemble == prompts.ensemble


def test_explanation_is_the_kept_prompts_by_weight_and_similarity() -> None:
    prompts = ENSEMBLES[0].prompts  # 4 normal, then one plain and four with a defect
    weights = np.array([1, 1, 1, 1, 1, 0, 2, 1, 0], dtype=np.float32)
    similarities = np.array([0.9, 0.9, 0.9, 0.9, 0.3, 0.8, 0.2, 0.1, 0.7], dtype=np.float32)
    found = explain(prompts, weights, similarities)
    assert [evidence.prompt for evidence in found] == [prompts[i].text for i in (6, 4, 7)]
    assert [evidence.weight for evidence in found] == [0.5, 0.25, 0.25]
    assert [evidence.defect for evidence in found] == ["crack", None, "hole"]
    assert len(explain(prompts, np.ones(9, dtype=np.float32), similarities)) == 5


@pytest.mark.parametrize(
    ("options", "aligner", "message"),
    [
        ({"levels": [4]}, "raw", "levels"),
        ({"levels": [-5]}, "raw", "levels"),
        ({"levels": [0]}, "value", "blocks 1 to 3"),
        ({"value_depth": 5}, "value", "value_depth is 5.* 4 blocks"),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    encoder: Encoder, options: dict[str, Any], aligner: str, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        Detector(encoder, Method.model_validate({"aligner": aligner, **options}))


def test_prompts_that_cannot_decide_are_refused(encoder: Encoder) -> None:
    detector = Detector(encoder, Method(aligner="raw"))
    one_sided = ENSEMBLES[0].model_copy(update={"prompts": ENSEMBLES[0].prompts[:4]})
    with pytest.raises(ValueError, match="nut have none of the anomalous side"):
        detector.embed(one_sided)
    with pytest.raises(ValueError, match="2 images came with 1"):
        detector.detect(random_pixels(2, (64, 64)), [detector.embed(ENSEMBLES[0])])


def test_equal_classes_embedded_twice_give_the_same(encoder: Encoder) -> None:
    detector = Detector(encoder, Method(aligner="value"))
    prompts = detector.embed(ENSEMBLES[0])
    pixels = random_pixels(1, (64, 64)).repeat(2, 1, 1, 1)
    assert_same(*detector.detect(pixels, [prompts, replace(prompts)]))
