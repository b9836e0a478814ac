"""Tests the detector's use of a GPU without one, on torch's fake tensors, which have shapes, types and devices but no
values. Operations on tensors of two devices fail, and so does reading a value, which would wait for a real GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import open_clip
import pytest
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)

from pipeline.alfa import Calibration, Detector, Encoder
from pipeline.alfa.device import to_device
from pipeline.tiling import Tiling
from schemas.job import Method, Peers, References
from tests.alfa.conftest import CONFIG, ensemble, random_pixels

GPU = torch.device("cuda")
CLASSES = [ensemble("nut", 4, ("crack", "hole")), ensemble("pill", 9, ()), ensemble("tile", 5, ("stain",))]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What fake tensors cannot do: be pinned, be waited for, or be converted in their place."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    monkeypatch.setattr(torch.nn.Module, "to", convert)
    monkeypatch.setattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", 0)  # single numbers would have values, which need a GPU
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        yield


def convert(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, torch.nn.Parameter(parameter.to(dtype), requires_grad=False))
    return module


def on_gpu(encoder: Encoder) -> Encoder:
    with GPU:
        clip = open_clip.CLIP(**CONFIG).eval().requires_grad_(False)
    del clip.logit_scale
    clip.logit_scale = SimpleNamespace(exp=lambda: 100.0)  # read once, as a number
    return Encoder(clip, open_clip.get_tokenizer("ViT-B-32"), encoder.preprocess, GPU, torch.bfloat16)


@pytest.mark.usefixtures("gpu")
def test_fake_tensors_find_what_a_gpu_would() -> None:
    there = torch.zeros(3, device=GPU)
    with pytest.raises(FakeTensorDeviceMismatchError):
        there + torch.zeros(3)
    with pytest.raises(DataDependentOutputException):
        there.sum().item()
    assert (there + to_device(torch.zeros(3), GPU)).device.type == "cuda"


@pytest.mark.parametrize(
    ("adaptation", "aligner"),
    [
        pytest.param(adaptation, aligner, marks=[] if adaptation == "mean" or aligner == "value" else pytest.mark.slow)
        for adaptation in ("none", "mean", "rank", "interval", "soft")
        for aligner in ("value", "ridge", "raw")
    ],
)
def test_a_batch_is_given_to_the_gpu_without_waiting_for_it(
    encoder: Encoder, request: pytest.FixtureRequest, aligner: str, adaptation: str
) -> None:
    method = Method.model_validate({"adaptation": adaptation, "aligner": aligner})
    references, peers = References(images="train"), Peers(images=2, min_images=2)
    here = Detector(encoder, method, references, peers)
    known = [here.embed(prompts) for prompts in CLASSES]
    images = random_pixels(2, (64, 64)).split(1)
    known[1] = replace(known[1], memory=here.remember(images))
    memory = here.remember_peers(images, (1, 2), ("a", "b"))
    known[2] = replace(known[2], peers=replace(memory, calibration=Calibration(0.1, 0.2, 0.3)))
    request.getfixturevalue("gpu")
    pixels = torch.zeros(5, 3, 64, 64, dtype=torch.uint8)
    there = Detector(on_gpu(encoder), method, references, peers)
    assert callable(there.start(pixels, [known[number % 3] for number in range(5)]))


def test_tiles_are_given_to_the_gpu_without_waiting_for_it(encoder: Encoder, request: pytest.FixtureRequest) -> None:
    known = Detector(encoder, Method(aligner="value")).embed(CLASSES[0])
    request.getfixturevalue("gpu")
    whole, tiles = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    there = Detector(on_gpu(encoder), Method(aligner="value"))
    assert callable(there.start_tiled(whole, tiles, Tiling((4, 6), (4, 4), ((0, 0), (0, 2))), known, 16))
