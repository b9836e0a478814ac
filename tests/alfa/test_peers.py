"""Peers: distances and fences by hand, against plain loops, and as the detector joins them with language."""

from __future__ import annotations

import math
import pickle
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.alfa import (
    Calibration,
    Detection,
    Detector,
    Encoder,
    ModelError,
    PeerMemory,
    PromptEmbeddings,
    Unfenced,
    fence_in,
    fingerprint_pixels,
)
from pipeline.alfa import patches as module
from pipeline.alfa.peers import average_neighbours, calibrate, combine, find_fence, peer_distance, remember_peers
from pipeline.tiling import plan_tiling
from schemas.job import Method, Peers, References
from tests.alfa.conftest import ensemble, random_pixels


def memory_of(images: list[torch.Tensor], fingerprints: list[int] | None = None) -> PeerMemory:
    return remember_peers(images, fingerprints or list(range(len(images))), [f"{n}.png" for n in range(len(images))])


def detector_of(encoder: Encoder, references: References | None = None, **options: Any) -> Detector:
    peers = Peers.model_validate({"images": 6, "min_images": 2, **options})
    return Detector(encoder, Method(aligner="raw"), references, peers)


def prepare(detector: Detector, known: PromptEmbeddings, pixels: torch.Tensor) -> PromptEmbeddings:
    """The class with the peers of these pixels, calibrated."""
    prints = fingerprint_pixels(pixels).tolist()
    memory = detector.remember_peers(list(pixels.split(1)), prints, [f"{n}.png" for n in range(len(pixels))])
    found = detector.detect(pixels, [replace(known, peers=memory)] * len(pixels))
    return replace(known, peers=fence_in(memory, [unfenced(item) for item in found], 0.7))


def unfenced(item: Detection) -> Unfenced:
    assert item.score_peers is not None and item.peer_distances is not None
    grids = (torch.from_numpy(grid).flatten() for grid in (item.grid, item.peer_distances))
    return Unfenced(item.score, item.score_peers, *grids)


def test_distances_by_hand() -> None:
    """Peers of one patch each, along x, y, -x and x; half of them count. The patch lies along x."""
    vectors = ([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0])
    memory = memory_of([torch.tensor([[vector]]) for vector in vectors], [10, 11, 12, 13])
    patch = torch.tensor([[[[2.0, 0.0]]]])
    distance, each = peer_distance(patch, torch.tensor([99]), memory, 0.5)
    np.testing.assert_allclose(each.flatten(), [0, 0.5, 1, 0], atol=1e-4)
    assert distance.item() == pytest.approx((0 + 0) / 2, abs=1e-4)
    # without the image itself, the first peer: two of three count (1.5 is rounded to 2)
    distance, each = peer_distance(patch, torch.tensor([10]), memory, 0.5)
    assert distance.item() == pytest.approx((0 + 0.5) / 2, abs=1e-4) and each.flatten()[0] == math.inf


@pytest.mark.parametrize("at_once", [1, 50, 1 << 24])
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_distances_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch, at_once: int, share: float) -> None:
    monkeypatch.setattr(module, "_COSINES_AT_ONCE", at_once)
    torch.manual_seed(0)
    peers = [torch.randn(2, count, 8) for count in (5, 3, 5, 4, 6)]
    images = torch.randn(2, 3, 6, 8)
    prints = torch.tensor([2, 70, 71])  # the first image has the pixels of the third peer
    found, _ = peer_distance(images, prints, memory_of(peers), share)
    for b in range(3):
        others = [peer for number, peer in enumerate(peers) if number != int(prints[b])]
        for p in range(6):
            levels = []
            for level in range(2):
                x = images[level, b, p]
                lowest = sorted(
                    min((1 - F.cosine_similarity(x, row, dim=0).item()) / 2 for row in peer[level]) for peer in others
                )
                levels.append(statistics.mean(lowest[: max(1, round(share * len(others)))]))
            assert found[b, p].item() == pytest.approx(statistics.mean(levels), abs=1e-3)


def test_the_order_of_the_peers_is_irrelevant_and_the_memory_can_be_pickled() -> None:
    torch.manual_seed(0)
    peers, images = [torch.randn(1, 4, 8) for _ in range(5)], torch.randn(1, 2, 4, 8)
    prints = torch.tensor([3, 9])
    first, each = peer_distance(images, prints, memory_of(peers), 0.4)
    turned = pickle.loads(pickle.dumps(memory_of(peers[::-1], [4, 3, 2, 1, 0])))
    second, each_turned = peer_distance(images, prints, turned, 0.4)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(each, each_turned.flip(2))


def test_neighbours_are_averaged_over_those_that_exist() -> None:
    tokens = torch.arange(6.0).view(1, 6, 1)  # 0 1 2 above 3 4 5
    assert average_neighbours(tokens, (2, 3), 3).flatten().tolist() == [2.0, 2.5, 3.0, 2.0, 2.5, 3.0]
    assert average_neighbours(tokens, (2, 3), 1).equal(tokens)


def test_equal_pixels_have_equal_fingerprints_and_others_do_not() -> None:
    pixels = random_pixels(4, (21, 35))  # 2,205 bytes: no multiple of a word
    prints = fingerprint_pixels(pixels)
    assert len(set(prints.tolist())) == 4 and fingerprint_pixels(pixels[2:3]).equal(prints[2:3])
    changed = pixels.clone()
    changed[0, 2, 20, 34] ^= 1
    assert fingerprint_pixels(changed)[0] != prints[0]
    assert fingerprint_pixels(pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)).equal(prints)


def test_large_memories_keep_as_many_patches_of_each_peer() -> None:
    memory = memory_of([torch.randn(1, count, 2) for count in (30_000, 20_000, 10)])
    assert memory.patches == (10_922, 10_922, 10) and memory.tokens.shape == (1, sum(memory.patches), 2)


def test_fences_by_hand() -> None:
    assert find_fence(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0])) == pytest.approx(3 + 3 * 1.4826 * 1)
    memory = memory_of([torch.randn(1, 2, 4) for _ in range(3)])
    values, scores = (0.1, 0.2, 0.4), (0.5, 0.6, 0.9)
    found = [
        Unfenced(score, value, torch.tensor([0.2, score]), torch.tensor([0.0, value]))
        for score, value in zip(scores, values, strict=True)
    ]
    calibration = fence_in(memory, found, 0.5).calibration
    c = 0.2 + 3 * 1.4826 * 0.1
    logits = [
        math.log(s / (1 - s)) for s in ((v / (v + c) + score) / 2 for v, score in zip(values, scores, strict=True))
    ]
    deviation = statistics.median(abs(item - logits[1]) for item in logits)
    peaks = [(0.1 + (v / (v + c) + score) / 2) / 2 for v, score in zip(values, scores, strict=True)]
    tops = [math.log(peak / (1 - peak)) for peak in peaks]
    spread = statistics.median(abs(item - tops[1]) for item in tops)
    assert calibration is not None and calibration.distance == pytest.approx(c)
    assert calibration.score == pytest.approx(logits[1] + 3 * 1.4826 * deviation, abs=1e-5)
    assert calibration.peak == pytest.approx(tops[1] + 3 * 1.4826 * spread, abs=1e-5)
    # what lies at the fence has 0.5, and equal peers give a fence above 0
    at_fence = combine(torch.tensor(0.3), torch.tensor(0.4), torch.tensor(c), 0.5)
    assert calibrate(at_fence, torch.logit(at_fence)).item() == pytest.approx(0.5)
    equal = fence_in(memory, [Unfenced(0.5, 0.0, torch.zeros(2), torch.zeros(2))] * 3, 0.5).calibration
    assert equal == Calibration(pytest.approx(1e-4), pytest.approx(math.log(0.25 / 0.75)), equal and equal.peak)


def test_score_and_map_join_language_and_peers(encoder: Encoder) -> None:
    """In a batch in which some classes have peers and some have none; an image that is a peer is not its own peer."""
    detector, u = detector_of(encoder), 0.7
    pixels, night = random_pixels(3, (64, 64)), random_pixels(6, (64, 64), seed=5)
    pill, nut = (detector.embed(ensemble(name, 4, ("crack",))) for name in ("pill", "nut"))
    known = prepare(detector, nut, night)
    pixels[2] = night[4]
    plain = detector.detect(pixels, [pill, nut, nut])
    found = detector.detect(pixels, [pill, known, known])
    assert found[0].score == pytest.approx(plain[0].score, abs=1e-6)
    assert (found[0].peers, found[0].score_peers, found[0].nearest_peer) == (0, None, None)
    assert known.peers is not None and known.peers.calibration is not None
    fence = known.peers.calibration
    for number in (1, 2):
        item, distances = found[number], found[number].peer_distances
        assert distances is not None and item.peers == 6 and item.score_peers is not None
        value = np.sort(distances.ravel())[-3:].mean()
        assert item.score_peers == pytest.approx(value / (value + fence.distance), abs=1e-5)
        joined = (1 - u) * plain[number].score + u * item.score_peers
        assert item.score == pytest.approx(1 / (1 + (1 - joined) / joined * math.exp(fence.score)), abs=1e-5)
        maps = (1 - u) * plain[number].grid + u * distances / (distances + fence.distance)
        np.testing.assert_allclose(item.grid, 1 / (1 + (1 - maps) / maps * math.exp(fence.peak)), atol=1e-5)
    assert found[2].nearest_peer is not None and (found[2].nearest_peer != 4).all()
    assert found[2].peer_distances is not None and found[2].peer_distances.min() > 1e-3
    alone = [detector.detect(pixels[n : n + 1], [[pill, known, known][n]])[0] for n in range(3)]
    assert [item.score for item in alone] == pytest.approx([item.score for item in found], abs=1e-5)


def test_a_defect_that_two_copies_of_a_photo_show_is_not_hidden(encoder: Encoder) -> None:
    """The same pixels twice among the images: neither is compared with the other, so both keep their distance."""
    detector = detector_of(encoder)
    night = random_pixels(6, (64, 64), seed=5)
    known = prepare(detector, detector.embed(ensemble("nut", 4, ("crack",))), night)
    twice = torch.stack([night[1], night[1], random_pixels(1, (64, 64), seed=9)[0]])
    first, second, _ = detector.detect(twice, [known] * 3)
    assert first.score == second.score and first.score_peers is not None and first.score_peers > 0.1


def test_with_references_language_is_what_they_make_of_it(encoder: Encoder) -> None:
    """(S + max R) / 2 takes the place of S, and half of m + R that of m, so that all stays within 0 and 1."""
    detector = detector_of(encoder, References(images="train"))
    pixels, night = random_pixels(2, (64, 64)), random_pixels(6, (64, 64), seed=5)
    memory = detector.remember(random_pixels(2, (64, 64), seed=7).split(1))
    few = replace(detector.embed(ensemble("nut", 4, ("crack",))), memory=memory)
    known = prepare(detector, few, night)
    assert known.peers is not None and known.peers.calibration is not None
    fence = known.peers.calibration
    for plain, item in zip(detector.detect(pixels, [few] * 2), detector.detect(pixels, [known] * 2), strict=True):
        assert item.score_peers is not None and item.peer_distances is not None
        joined = 0.3 * plain.score + 0.7 * item.score_peers
        assert item.score == pytest.approx(1 / (1 + (1 - joined) / joined * math.exp(fence.score)), abs=1e-5)
        maps = 0.3 * plain.grid / 2 + 0.7 * item.peer_distances / (item.peer_distances + fence.distance)
        np.testing.assert_allclose(item.grid, 1 / (1 + (1 - maps) / maps * math.exp(fence.peak)), atol=1e-5)
        assert item.grid.min() >= 0 and item.grid.max() <= 1 and item.score_reference == plain.score_reference


@pytest.mark.parametrize("levels", [(4,), (-5,)])
def test_levels_that_the_model_does_not_have_are_refused(encoder: Encoder, levels: Any) -> None:
    with pytest.raises(ModelError, match=r"peers.levels .* blocks 0 to 3"):
        detector_of(encoder, levels=levels)


def test_a_tile_over_the_whole_photo_gives_what_the_whole_gives(encoder: Encoder) -> None:
    """Also of a photo that is a peer: the fingerprint is that of the whole."""
    detector = detector_of(encoder)
    night = random_pixels(6, (64, 64), seed=5)
    known = prepare(detector, detector.embed(ensemble("nut", 4, ("crack",))), night)
    tiling = plan_tiling(64, 64, encoder.grid, 64, 0)
    (plain,) = detector.detect(night[3:4], [known])
    (tiled,) = detector.start_tiled(night[3], night[3:4], tiling, known, 8)()
    for name in ("score", "score_peers", "grid", "peer_distances", "nearest_peer"):
        np.testing.assert_allclose(getattr(tiled, name), getattr(plain, name), atol=1e-5)
