"""The memory of a class: the encoded references and peers, made once per run and kept in the lake."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch

from pipeline.alfa import (
    Calibration,
    Detector,
    PeerMemory,
    PromptEmbeddings,
    ReferenceMemory,
    Unfenced,
    fence_in,
    fingerprint_pixels,
)
from pipeline.images import Decoded, ImageError, Isolation
from pipeline.scoring.batches import View, detect, read_image, to_tensor
from pipeline.scoring.reading import PhotoDecoder
from pipeline.scoring.spans import RunSpans, Spans
from pipeline.storage import AddressError, Run, Store, leases, open_store, paths
from schemas.job import JobConfig

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]

CANDIDATES_PER_PEER = 4
"""Candidates that are listed for each peer: if some cannot be read, the next ones take their place."""
_CLASSES_KEPT = 8
"""Number of classes whose memories a process keeps at a time."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The photos that a class is compared with, as manifest rows.

    references: known-good photos. peers: candidates from tonight, in the order in which they are tried. earlier:
    candidates from earlier nights, tried if tonight has too few.
    """

    references: Sequence[Row] = ()
    peers: Sequence[Row] = ()
    earlier: Sequence[Row] = ()


@dataclass(frozen=True, eq=False)
class StoredMemory:
    """The memory of a class as it is stored in the lake.

    references, peers: None where the class has none. scores: [K, 2], float32, score and highest map value of each
    reference image, scored against the others (leave one out); [0, 2] where there are fewer than two.
    """

    references: ReferenceMemory | None
    peers: PeerMemory | None
    scores: torch.Tensor


class Classes(Protocol):
    """Embeddings by class name: a dictionary, or PreparedClasses."""

    def __getitem__(self, class_name: str, /) -> PromptEmbeddings:
        """Returns the embeddings of a class, with its memory if it has one."""


class PreparedClasses:
    """The classes of a run with their memories. Each is prepared on first use; the last eight used are kept."""

    def __init__(self, prepare: Callable[[str], PromptEmbeddings]) -> None:
        self._prepare = lru_cache(_CLASSES_KEPT)(prepare)

    def __getitem__(self, class_name: str, /) -> PromptEmbeddings:
        return self._prepare(class_name)


def prepare_class(
    run: Run,
    embeddings: PromptEmbeddings,
    neighbours: Neighbours,
    detector: Detector,
    source: Store,
    output: Store,
    owner: str,
    *,
    guard: AbstractContextManager[Any] | None = None,
    isolate: bool = False,
) -> PromptEmbeddings:
    """Returns the embeddings of a class with the memory of its references and peers; makes the memory if it is missing.

    Of several processes, one makes the memory and the others wait (a lease). It is written create-only, so that all of
    them score against the same memory. source: the store of the night's images. guard, isolate: as score_shard takes
    them, because a reference or peer, too, can kill its decoder. Raises OSError where the output cannot be written,
    StoreError where a store cannot be used.
    """
    wants_peers = run.job.peers is not None and (
        len(neighbours.peers) + len(neighbours.earlier) >= run.job.peers.min_images
    )
    if not neighbours.references and not wants_peers:
        return embeddings
    name, lease_s = embeddings.ensemble.class_name, run.job.engine.lease_s
    key = paths.memory_key(run.run_id, name)
    lease = leases.acquire(output, key, owner, lease_s, lambda: output.exists(key))
    if lease is not None:
        with lease.held(lease_s, discard=True), Isolation() if isolate else nullcontext() as isolation:
            spans = RunSpans(run.job, run.run_id, source, output, isolation)
            made = make_memory(
                embeddings, neighbours, detector, run.job, source, spans, guard=guard, isolation=isolation
            )
            output.create(key, _pack(made))
    stored = read_memory(run.run_id, name, output)
    assert stored is not None, key
    return replace(embeddings, memory=stored.references, peers=stored.peers)


def make_memory(
    embeddings: PromptEmbeddings,
    neighbours: Neighbours,
    detector: Detector,
    job: JobConfig,
    source: Store,
    spans: Spans,
    *,
    guard: AbstractContextManager[Any] | None = None,
    isolation: Isolation | None = None,
) -> StoredMemory:
    """Reads the references and peers of a class, and makes its memory. guard, isolation: as PhotoDecoder takes them.

    References that cannot be read are left out with a warning. A peer that cannot be read, or has the same pixels as
    another, is replaced by the next candidate.
    """
    class_name = embeddings.ensemble.class_name
    decoder = PhotoDecoder(job, View.of(detector), spans, guard=guard, isolation=isolation)

    def read(row: Row, store: Store) -> Decoded | ImageError:
        return read_image(row["uri"], store, partial(decoder.decode, class_name))

    good = list(_read_references(class_name, neighbours.references, job, read))
    if len(good) < (wanted := len(neighbours.references)):
        logger.warning("only %d of the %d reference images of %s can be read", len(good), wanted, class_name)
    if good:
        memory = detector.remember([_views(image) for image in good], job.model.batch_size)
        embeddings = replace(embeddings, memory=memory)
    unchanged = partial(_is_unchanged, source=source)
    peers = _make_peers(embeddings, neighbours, detector, job, partial(read, store=source), unchanged)
    embeddings = replace(embeddings, peers=peers)
    return StoredMemory(embeddings.memory, embeddings.peers, _leave_one_out(good, embeddings, detector, job))


def read_memory(run_id: str, class_name: str, output: Store) -> StoredMemory | None:
    """Reads the stored memory of a class; None where the run has none."""
    try:
        data = output.read(paths.memory_key(run_id, class_name))
    except FileNotFoundError:
        return None
    tensors = safetensors.torch.load(data)
    about = json.loads(bytes(tensors["about"].tolist()))
    references = peers = None
    if "references" in tensors:
        references = ReferenceMemory(tensors["references"], tuple(tensors["reference_patches"].tolist()))
    if "peers" in tensors:
        patches, prints = tuple(tensors["peer_patches"].tolist()), tensors["fingerprints"]
        calibration = Calibration(**about["calibration"])
        peers = PeerMemory(tensors["peers"], patches, prints, tuple(about["uris"]), about["earlier"], calibration)
    return StoredMemory(references, peers, tensors["scores"])


def _pack(stored: StoredMemory) -> bytes:
    tensors, about = {"scores": stored.scores}, {}
    if stored.references is not None:
        tensors["references"] = stored.references.tokens
        tensors["reference_patches"] = torch.tensor(stored.references.patches)
    if (peers := stored.peers) is not None and peers.calibration is not None:
        tensors |= {"peers": peers.tokens, "peer_patches": torch.tensor(peers.patches)}
        tensors["fingerprints"] = peers.fingerprints
        about = {"uris": peers.uris, "earlier": peers.earlier, "calibration": asdict(peers.calibration)}
    tensors["about"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    return safetensors.torch.save(tensors)


def _read_references(
    class_name: str, rows: Sequence[Row], job: JobConfig, read: Callable[[Row, Store], Decoded | ImageError]
) -> Iterator[Decoded]:
    for row in rows:
        item = read(row, open_store(row["uri"].rpartition("/")[0], job.storage))
        if isinstance(item, Decoded):
            yield item
        else:
            logger.warning("reference %s of %s is left out: %s", row["uri"], class_name, item.message)


def _make_peers(
    embeddings: PromptEmbeddings,
    neighbours: Neighbours,
    detector: Detector,
    job: JobConfig,
    read: Callable[[Row], Decoded | ImageError],
    is_unchanged: Callable[[Row], bool],
) -> PeerMemory | None:
    """Makes the calibrated memory of the peers; None where fewer than peers.min_images can be read."""
    if (options := job.peers) is None:
        return None
    found: dict[int, tuple[str, Decoded]] = {}
    earlier = 0
    for number, row in enumerate([*neighbours.peers, *neighbours.earlier]):
        if len(found) == options.images:
            break
        if number >= len(neighbours.peers) and not is_unchanged(row):
            continue
        item = read(row)
        if isinstance(item, Decoded):
            fingerprint = int(fingerprint_pixels(to_tensor([item.pixels]))[0])
            if fingerprint not in found:
                found[fingerprint] = row["uri"], item
                earlier += number >= len(neighbours.peers)
    if len(found) < options.min_images:
        return None
    uris, images = zip(*found.values(), strict=True)
    size = job.model.batch_size
    memory = detector.remember_peers([_views(item) for item in images], list(found), uris, earlier, size)
    known = replace(embeddings, peers=memory)
    outcomes = []
    for start in range(0, len(images), size):
        some = images[start : start + size]
        for outcome in detect(detector, some, [known] * len(some), job):
            assert outcome.score_peers is not None and outcome.peer_distances is not None
            grid, distances = (torch.from_numpy(part).flatten() for part in (outcome.grid, outcome.peer_distances))
            outcomes.append(Unfenced(outcome.score, outcome.score_peers, grid, distances))
    return fence_in(memory, outcomes, options.weight)


def _is_unchanged(row: Row, source: Store) -> bool:
    """Whether a photo of an earlier night is still the one that was scored then."""
    try:
        return row["etag"] is None or source.info_uri(row["uri"]).etag == row["etag"]
    except (FileNotFoundError, AddressError):
        return False


def _views(image: Decoded) -> torch.Tensor:
    """Returns the views of an image that are compared, [V, 3, H, W], uint8: its tiles, or the whole image."""
    pixels = image.pixels[None] if image.tiles is None else image.tiles
    return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)


def _leave_one_out(
    images: Sequence[Decoded], embeddings: PromptEmbeddings, detector: Detector, job: JobConfig
) -> torch.Tensor:
    if embeddings.memory is None or embeddings.memory.shots < 2:
        return torch.empty(0, 2)
    scores = []
    for number, image in enumerate(images):
        others = replace(embeddings, memory=embeddings.memory.without(number))
        scores += [(found.score, float(found.grid.max())) for found in detect(detector, [image], [others], job)]
    return torch.tensor(scores)
