"""Measures how much faster ALFA is than zero-shot WinCLIP (arXiv 2303.14814) with the same model.

WinCLIP encodes each image once, and each window of 2 x 2 and 3 x 3 patches separately: 365 masked passes per image in
ViT-B-16-plus-240, which has 15 x 15 patches. Here the pass of a window only has its own tokens and the class token.
Masking in attention, with all 226 tokens in each pass, would give the same embeddings (tests/bench/test_winclip.py) but
be far slower, so WinCLIP is compared at its cheapest.

Runs interleave in one process, on the same batch, and medians are compared. It does not import Ray. The model has
random weights, because only its speed matters.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.alfa import Detector, Encoder, PromptEmbeddings
from pipeline.alfa.aligner import window_patches
from schemas.job import Method
from tests.bench.measuring import measure, print_table, write_results
from tests.bench.models import DEVICE, SETTLE, build, compose_base, encode_bare, name_device


@dataclass(frozen=True, eq=False)
class Anomalies:
    """What WinCLIP finds in B images: scores [B] and maps [B, gh, gw], float32, probabilities."""

    scores: Tensor
    maps: Tensor


@torch.inference_mode()
def detect(pixels: Tensor, prompts: PromptEmbeddings, encoder: Encoder, at_once: int) -> Anomalies:
    """Zero-shot WinCLIP on pixels [B, 3, H, W], uint8, of the encoder's size; `at_once` windows in a forward pass.

    A map is the harmonic mean of three: the score of the whole image, and at both sizes of windows the harmonic mean
    of those that hold the patch.
    """
    sides = torch.stack([prompts.embeddings[side].mean(0) for side in (~prompts.is_anomalous, prompts.is_anomalous)])
    sides = F.normalize(sides, dim=-1).to(encoder.device)

    def score(embeddings: Tensor) -> Tensor:
        return (encoder.logit_scale * embeddings @ sides.T).softmax(-1)[..., 1]

    features = encoder.encode_images(pixels, (encoder.blocks - 1,))
    scores, patches = score(features.embedding), encoder.grid[0] * encoder.grid[1]
    scales = [scores[:, None].expand(-1, patches)]
    for windows in window_patches(encoder.grid):
        found = score(embed_windows(features.embedded, windows, encoder, at_once))
        scales.append(spread(found, windows.to(encoder.device), patches))
    return Anomalies(scores, harmonic_mean(torch.stack(scales)).unflatten(1, encoder.grid))


def embed_windows(embedded: Tensor, windows: Tensor, encoder: Encoder, at_once: int) -> Tensor:
    """Class embeddings [B, R, D] of windows of patches [R, N], each with the class token through the ViT alone.

    embedded: the tokens that enter the first block [B, 1 + P, W], positions added.
    """
    parts = []
    for some in windows.split(max(1, at_once // len(embedded))):
        classes = embedded[:, None, :1].expand(-1, len(some), -1, -1)
        tokens = torch.cat([classes, embedded[:, 1:][:, some]], dim=2)
        parts.append(encoder.encode_tokens(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2]))
    return torch.cat(parts, dim=1)


def spread(scores: Tensor, windows: Tensor, patches: int) -> Tensor:
    """Scores of windows [B, R] to patches [B, P]: the harmonic mean of the windows [R, N] that hold a patch."""
    holds = torch.zeros(len(windows), patches, device=scores.device).scatter(1, windows, 1.0)
    return holds.sum(0) / (1 / scores @ holds)


def harmonic_mean(values: Tensor) -> Tensor:
    """Over the first dimension."""
    return len(values) / (1 / values).sum(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16-plus-240")
    parser.add_argument("--batch", type=int, default=16 if DEVICE.type == "cuda" else 2)
    parser.add_argument("--at-once", type=int, default=2048, help="windows in a forward pass of WinCLIP")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    clip, encoder = build(options.model)
    pixels = torch.randint(0, 256, (options.batch, 3, *encoder.preprocess.size), dtype=torch.uint8)
    ready = pixels.to(DEVICE).float()
    detector = Detector(encoder, Method(aligner="value"))
    prompts = detector.embed(compose_base("part"))
    runs: dict[str, Callable[[], object]] = {
        "bare encode_image": lambda: encode_bare(clip, ready),
        "detector, value": lambda: detector.detect(pixels, [prompts] * options.batch),
        "WinCLIP": lambda: detect(pixels, prompts, encoder, options.at_once),
    }
    seconds = measure(runs, options.repetitions, SETTLE)
    where = name_device()
    rows = [
        (
            name,
            f"{options.batch / value:.3f}",
            f"{value / seconds['bare encode_image']:.2f}",
            f"{seconds['WinCLIP'] / value:.1f}",
        )
        for name, value in seconds.items()
    ]
    windows = sum(len(windows) for windows in window_patches(encoder.grid))
    title = f"{options.model}, {windows} windows an image, batch {options.batch}, {where}"
    print_table(title, ("run", "images/s", "time / bare", "times as fast as WinCLIP"), rows)
    facts = {"model": options.model, "windows": windows, "batch": options.batch, "at_once": options.at_once}
    write_results(f"winclip-{DEVICE.type}", {**facts, "machine": where, "seconds": seconds})


if __name__ == "__main__":
    main()
