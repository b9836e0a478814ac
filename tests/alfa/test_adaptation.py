"""Tests the contextual score and the options of adaptation on an example worked by hand."""

from __future__ import annotations

import pytest
import torch

from pipeline.alfa.adaptation import PromptBatch, adapt, contextual_scores, prototypes, random_filter
from schemas.job import Method

# One image, three normal and four anomalous prompts, distances d = 1 - s; means 0.28333 and 0.6125: it leans to normal.
# C = 0.6125 - d for the normal, 0.28333 - d for the anomalous.
DISTANCES = torch.tensor([[0.1, 0.2, 0.55, 0.35, 0.5, 0.7, 0.9]])
CONTEXTUAL = [0.5125, 0.4125, 0.0625, -0.066667, -0.216667, -0.416667, -0.616667]


def batch(normal: int = 3, anomalous: int = 4) -> PromptBatch:
    side = torch.tensor([[False] * normal + [True] * anomalous])
    return PromptBatch(torch.eye(normal + anomalous)[None], side, torch.ones_like(side))


def weights(distances: torch.Tensor, prompts: PromptBatch, **options: object) -> list[float]:
    method = Method.model_validate({"floor_count": 1, "floor_share": 0.0, **options})
    return adapt(1 - distances, prompts, method)[0].tolist()


def test_contextual_score_by_hand() -> None:
    assert contextual_scores(DISTANCES, batch())[0].tolist() == pytest.approx(CONTEXTUAL, abs=1e-5)


def test_none_keeps_all() -> None:
    assert weights(DISTANCES, batch(), adaptation="none") == [1] * 7


def test_mean_drops_what_lies_beyond_the_other_mean() -> None:
    assert weights(DISTANCES, batch()) == [1] * 7
    # Normal 0.1 0.2 0.75 (mean 0.35), anomalous 0.3 0.5 0.7 0.9 (mean 0.6): the third normal and the first anomalous
    # lie beyond the other mean (C = -0.15 on the leaning side, C = 0.05 on the other).
    ambiguous = torch.tensor([[0.1, 0.2, 0.75, 0.3, 0.5, 0.7, 0.9]])
    assert weights(ambiguous, batch()) == [1, 1, 0, 0, 1, 1, 1]


def test_mean_when_the_image_leans_to_anomalous() -> None:
    # Anomalous 0.1 0.2 0.75 0.35 (mean 0.35), normal 0.3 0.6 0.9 (mean 0.6): the mirror image.
    distances = torch.tensor([[0.3, 0.6, 0.9, 0.1, 0.2, 0.75, 0.35]])
    assert weights(distances, batch()) == [0, 1, 1, 1, 1, 0, 1]


def test_rank_asks_for_half_of_the_opposite_prompts() -> None:
    # Normal 0.1 0.2 0.75 beat 4/4, 4/4, 1/4 of the anomalous; anomalous 0.3 0.5 0.7 0.9 beat 1/3, 1/3, 1/3, 0/3 of the
    # normal, and the side that the image does not lean to keeps those that beat at most half: all.
    distances = torch.tensor([[0.1, 0.2, 0.75, 0.3, 0.5, 0.7, 0.9]])
    assert weights(distances, batch(), adaptation="rank") == [1, 1, 0, 1, 1, 1, 1]


def test_interval_drops_the_overlap() -> None:
    # [0.1, 0.55] and [0.35, 0.9] overlap in [0.35, 0.55].
    assert weights(DISTANCES, batch(), adaptation="interval") == [1, 1, 0, 0, 0, 1, 1]
    apart = torch.tensor([[0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8]])
    assert weights(apart, batch(), adaptation="interval") == [1] * 7


def test_soft_is_a_softmax_within_each_side() -> None:
    found = weights(DISTANCES, batch(), adaptation="soft", soft_temperature=0.2)
    oriented = torch.tensor(CONTEXTUAL) * torch.tensor([1, 1, 1, -1, -1, -1, -1])
    expected = torch.cat([(oriented[:3] / 0.2).softmax(0), (oriented[3:] / 0.2).softmax(0)])
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
    assert sum(found[:3]) == pytest.approx(1) and sum(found[3:]) == pytest.approx(1)


def test_floor_keeps_the_best_after_what_is_kept_anyway() -> None:
    # It leans to normal (means 0.433 and 0.6), so best is near among the normal, far among the anomalous. The overlap
    # [0.2, 0.8] holds all normal prompts, of which the nearest must stay, and 0.6 and 0.8 of the anomalous.
    distances = torch.tensor([[0.2, 0.3, 0.8, 0.1, 0.6, 0.8, 0.9]])
    assert weights(distances, batch(), adaptation="interval") == [1, 0, 0, 1, 0, 0, 1]
    assert weights(distances, batch(), adaptation="interval", floor_count=2) == [1, 1, 0, 1, 0, 0, 1]
    assert weights(distances, batch(), adaptation="interval", floor_share=0.75) == [1, 1, 1, 1, 0, 1, 1]
    assert weights(distances, batch(), adaptation="interval", floor_count=50) == [1] * 7


def test_floor_share_is_not_rounded_up_by_floating_point() -> None:
    # 0.1 * 30 is 3.0000000000000004 in floating point; the floor is 3. All normal prompts lie in the overlap.
    distances = torch.cat([torch.linspace(0.4, 0.5, 30), torch.tensor([0.3, 0.6])])[None]
    kept = weights(distances, batch(30, 2), adaptation="interval", floor_share=0.1)
    assert sum(kept[:30]) == 3


@pytest.mark.parametrize("adaptation", ["none", "mean", "rank", "interval", "soft"])
def test_padding_changes_nothing(adaptation: str) -> None:
    method = Method.model_validate({"adaptation": adaptation})
    generator = torch.Generator().manual_seed(3)
    counts = [(5, 9), (3, 3), (12, 4)]
    similarities = [torch.rand(n + a, generator=generator) for n, a in counts]
    alone = [adapt(s[None], batch(n, a), method)[0] for s, (n, a) in zip(similarities, counts, strict=True)]
    pad = torch.nn.utils.rnn.pad_sequence
    anomalous = pad([batch(n, a).anomalous[0] for n, a in counts], batch_first=True)
    valid = pad([torch.ones(n + a, dtype=torch.bool) for n, a in counts], batch_first=True)
    together = adapt(pad(similarities, batch_first=True), PromptBatch(torch.empty(0), anomalous, valid), method)
    for row, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(row[: len(expected)], expected)
        assert not row[len(expected) :].any()


def test_random_filter_keeps_as_many_of_each_side() -> None:
    prompts = batch(20, 30)
    similarities = torch.rand(1, 50, generator=torch.Generator().manual_seed(0))
    kept = adapt(similarities, prompts, Method(adaptation="interval"))
    drawn = random_filter(kept, prompts, torch.Generator().manual_seed(1))
    for side in prompts.sides:
        assert (drawn * side).sum() == (kept * side).sum()
    assert torch.equal(drawn, random_filter(kept, prompts, torch.Generator().manual_seed(1)))
    assert not torch.equal(drawn, random_filter(kept, prompts, torch.Generator().manual_seed(2)))


def test_the_option_random_keeps_as_many_as_mean_and_others() -> None:
    prompts = batch(20, 30)
    similarities = torch.rand(1, 50, generator=torch.Generator().manual_seed(0))
    mean, drawn = (adapt(similarities, prompts, Method.model_validate({"adaptation": x})) for x in ("mean", "random"))
    for side in prompts.sides:
        assert 0 < (drawn * side).sum() == (mean * side).sum() < side.sum()
    assert not torch.equal(drawn, mean)
    assert torch.equal(drawn, adapt(similarities, prompts, Method(adaptation="random")))


def test_prototypes_are_normalised_means_of_what_is_kept() -> None:
    found = prototypes(torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 3.0]]), batch())
    half, tenth = 0.5**0.5, 0.1**0.5
    assert found[0, 0].tolist() == pytest.approx([half, half, 0, 0, 0, 0, 0])
    assert found[0, 1].tolist() == pytest.approx([0, 0, 0, tenth, 0, 0, 3 * tenth])
