"""Small random open_clip ViTs, with their weights in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from pipeline.alfa import Encoder, load_encoder, locate_weights
from schemas.job import Model
from schemas.prompts import Prompt, PromptEnsemble

CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "layers": 4, "width": 32, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_model(folder: Path, name: str, **vision: Any) -> Model:
    """Registers a configuration with open_clip and saves random weights for it; the patch positions are not tiny."""
    config = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], **vision}}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    clip = open_clip.create_model(name)
    for key, parameter in clip.named_parameters():
        if key.endswith("bias") or key.endswith("gamma"):
            torch.nn.init.normal_(parameter, std=0.3)
    torch.save(clip.state_dict(), folder / f"{name}.pt")
    return Model(name=name, pretrained=str(folder / f"{name}.pt"), device="cpu")


@pytest.fixture(scope="session")
def square(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return write_model(tmp_path_factory.mktemp("square"), "test-vit")


@pytest.fixture(scope="session")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return write_model(tmp_path_factory.mktemp("scaled"), "test-vit-scaled", ls_init_value=0.1)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return write_model(tmp_path_factory.mktemp("wide"), "test-vit-wide", image_size=[48, 80])


@pytest.fixture(scope="session")
def load() -> Callable[[Model], Encoder]:
    return lambda model: load_encoder(model, locate_weights(model))


@pytest.fixture(scope="session")
def encoder(square: Model, load: Callable[[Model], Encoder]) -> Encoder:
    return load(square)


def random_pixels(count: int, size: tuple[int, int], seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def ensemble(class_name: str, normal: int, defects: tuple[str, ...]) -> PromptEnsemble:
    """`normal` normal prompts, a plain anomalous one, and two for each defect."""
    prompts = [Prompt(text=f"a flawless {class_name} number {i}", side="normal", source="base") for i in range(normal)]
    prompts.append(Prompt(text=f"a damaged {class_name}", side="anomalous", source="base"))
    for defect in defects:
        for view in ("photo", "close-up"):
            text = f"a {view} of a {class_name} with a {defect}"
            prompts.append(Prompt(text=text, side="anomalous", source="llm", defect=defect))
    return PromptEnsemble(class_name=class_name, source="llm", fingerprint=class_name, prompts=tuple(prompts))
