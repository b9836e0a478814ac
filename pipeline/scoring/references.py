"""Few-shot, the part with input and output: which images a class is compared with, and their memory in the lake."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import safetensors.torch
import torch

from pipeline.alfa import Detector, PromptEmbeddings, ReferenceMemory
from pipeline.images import Decoded
from pipeline.scoring.batches import detect, image_decoder, read_image
from pipeline.storage import Store, open_store, paths
from schemas.job import JobConfig

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class StoredMemory:
    """A class's memory as it lies in the lake.

    scores: [K, 2], float32, score and highest map value of each reference image as the others see it (leave one out);
    [0, 2] where there is but one image.
    """

    memory: ReferenceMemory
    scores: torch.Tensor


def choose_references(rows: Sequence[Row], shots: int, seed: int) -> dict[str, list[Row]]:
    """For each class, `shots` of its images: those whose hash with the seed is lowest, so more shots keep those of
    fewer, and images that are added elsewhere change nothing. Where there are fewer, all. rows: manifest rows."""
    by_class: dict[str, list[Row]] = {}
    for row in rows:
        by_class.setdefault(row["class_name"], []).append(row)

    def rank(row: Row) -> tuple[bytes, str]:
        text = f"{seed}\0{row['class_name']}\0{row['key']}"
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), row["key"]

    return {name: sorted(found, key=rank)[:shots] for name, found in by_class.items()}


def build_memory(
    run_id: str,
    embeddings: PromptEmbeddings,
    images: Sequence[Mapping[str, Any]],
    detector: Detector,
    job: JobConfig,
    output: Store,
) -> PromptEmbeddings:
    """The class with the memory of its reference images: the run's stored one, else it is made and stored.

    Without an image that can be decoded, the class stays zero-shot.
    """
    class_name = embeddings.ensemble.class_name
    stored = read_memory(run_id, class_name, output)
    if stored is None:
        stored = make_memory(embeddings, images, detector, job)
        if stored is None:
            return embeddings
        memory = stored.memory
        tensors = {"tokens": memory.tokens, "patches": torch.tensor(memory.patches), "scores": stored.scores}
        output.write(paths.memory_key(run_id, class_name), safetensors.torch.save(tensors))
    return replace(embeddings, memory=stored.memory)


def make_memory(
    embeddings: PromptEmbeddings, images: Sequence[Mapping[str, Any]], detector: Detector, job: JobConfig
) -> StoredMemory | None:
    """The memory of reference images, given as manifest rows; None where there are none.

    An image that cannot be read or decoded is left out, with a warning.
    """
    decode, good = image_decoder(job, detector), []
    for image in images:
        folder = image["uri"].rpartition("/")[0]
        item = read_image(image["uri"], open_store(folder, job.storage), decode)
        if isinstance(item, Decoded):
            good.append(item)
        else:
            class_name = embeddings.ensemble.class_name
            logger.warning("reference %s of %s is left out: %s", image["uri"], class_name, item.message)
    if not good:
        return None
    memory = detector.remember([_views(item) for item in good], job.model.batch_size)
    return StoredMemory(memory, _leave_one_out(good, memory, embeddings, detector, job))


def read_memory(run_id: str, class_name: str, output: Store) -> StoredMemory | None:
    """The stored memory of a class; None where the run has none."""
    try:
        tensors = safetensors.torch.load(output.read(paths.memory_key(run_id, class_name)))
    except FileNotFoundError:
        return None
    return StoredMemory(ReferenceMemory(tensors["tokens"], tuple(tensors["patches"].tolist())), tensors["scores"])


def describe_choice(chosen: Mapping[str, Sequence[Row]], classes: Sequence[str], shots: int) -> list[str]:
    """A line for each class that has fewer references than were asked for."""
    lines = []
    for name in classes:
        count = len(chosen.get(name, ()))
        if not count:
            lines.append(f"class {name} has no reference images; it is scored zero-shot")
        elif count < shots:
            lines.append(f"class {name} has {count} reference images, not {shots}; all of them are used")
    return lines


def _views(image: Decoded) -> torch.Tensor:
    """What is compared of an image [V, 3, H, W]: its tiles, or the whole."""
    pixels = image.pixels[None] if image.tiles is None else image.tiles
    return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)


def _leave_one_out(
    images: Sequence[Decoded],
    memory: ReferenceMemory,
    embeddings: PromptEmbeddings,
    detector: Detector,
    job: JobConfig,
) -> torch.Tensor:
    if memory.shots < 2:
        return torch.empty(0, 2)
    scores = []
    for number, image in enumerate(images):
        others = replace(embeddings, memory=memory.without(number))
        scores += [(found.score, float(found.grid.max())) for found in detect(detector, [image], [others], job)]
    return torch.tensor(scores)
