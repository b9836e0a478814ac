"""Shared by the benches of the model: a model with random weights, and scoring as actors do it. Does not import Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone

import open_clip
import torch

from pipeline.alfa import Detector, Encoder, Preprocess, PromptEmbeddings
from pipeline.prompts import compose_ensemble
from pipeline.scoring import Shard, ShardStats, score_shard
from pipeline.storage import Run, Store
from schemas.job import EMBEDDED_MODEL
from schemas.prompts import PromptEnsemble, PromptSet
from tests.places import ROOT

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTLE: Callable[[], object] | None = torch.cuda.synchronize if DEVICE.type == "cuda" else None
"""Waits for what the device has only been asked for."""


def name_device(device: torch.device = DEVICE) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def build(name: str, device: torch.device = DEVICE) -> tuple[open_clip.CLIP, Encoder]:
    """A model with random weights, always the same, bare and as alfa's encoder."""
    torch.manual_seed(0)
    if name == EMBEDDED_MODEL:
        open_clip.add_model_config(ROOT / "pipeline" / "alfa" / "models" / name / f"{name}.json")
    clip = open_clip.create_model(name, device=device).eval().requires_grad_(False)
    preprocess = Preprocess(
        clip.visual.image_size, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, "bicubic"
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return clip, Encoder(clip, open_clip.get_tokenizer(name), preprocess, device, dtype)


@torch.inference_mode()
def encode_bare(clip: open_clip.CLIP, images: torch.Tensor) -> torch.Tensor:
    """open_clip's own encode_image of images [B, 3, H, W], float32, on the device."""
    kind = images.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        embeddings: torch.Tensor = clip.encode_image(images)
    return embeddings


def compose_base(class_name: str) -> PromptEnsemble:
    """The base ensemble of a class that nobody has described."""
    now = datetime.now(timezone.utc)
    prompt_set = PromptSet(class_name=class_name, source="base", recipe="bench", created_at=now)
    return compose_ensemble(prompt_set, lambda _: True)


def score_shards(
    shards: Iterable[Shard],
    run: Run,
    detector: Detector,
    prompts: Mapping[str, PromptEmbeddings],
    source: Store,
    output: Store,
    cpus: int,
) -> list[ShardStats]:
    """Scores shards as a scoring actor of so many cores does: two at a time, which take turns with the model."""
    turn, threads = threading.Lock(), max(4, 2 * cpus)

    def score(shard: Shard) -> ShardStats:
        return score_shard(shard, run, detector, prompts, source, output, threads, turn=turn)

    with ThreadPoolExecutor(2) as calls:
        return list(calls.map(score, shards))
