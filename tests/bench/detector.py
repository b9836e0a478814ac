"""Measures the time of ALFA over that of CLIP alone: the detector against a bare encode_image loop, in one process.

Runs interleave and medians are compared, so that a busy machine slows both alike. It does not import Ray. The model has
random weights, because only its speed matters.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pipeline.alfa import Calibration, Detector, Encoder, PromptEmbeddings
from schemas.job import EMBEDDED_MODEL, Method, Peers
from schemas.prompts import PromptEnsemble
from tests.bench.measuring import measure, print_table, write_results
from tests.bench.models import DEVICE, SETTLE, build, compose_base, encode_bare, name_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = DEVICE.type == "cuda"
    parser.add_argument("--model", default="ViT-B-16-plus-240" if on_gpu else "ViT-B-16")
    parser.add_argument("--batch", type=int, default=64 if on_gpu else 4)
    parser.add_argument("--batches", type=int, default=16 if on_gpu else 1, help="batches that follow one another")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    clip, encoder = build(options.model)
    pixels = torch.randint(0, 256, (options.batch, 3, *encoder.preprocess.size), dtype=torch.uint8)
    ready, ensemble = pixels.to(DEVICE).float(), compose_base("part")

    def run_bare() -> None:
        for _ in range(options.batches):
            encode_bare(clip, ready)

    def run_detector(detector: Detector, prompts: Sequence[PromptEmbeddings]) -> None:
        for pending in [detector.start(pixels, prompts) for _ in range(options.batches)]:
            pending()

    runs: dict[str, Callable[[], object]] = {"bare encode_image": run_bare}
    for aligner in ("raw", "value", "ridge"):
        detector = Detector(encoder, Method.model_validate({"aligner": aligner}))
        prompts = [detector.embed(ensemble)] * options.batch
        runs[f"detector, {aligner}"] = functools.partial(run_detector, detector, prompts)
    aligner = "raw" if options.model == EMBEDDED_MODEL else "value"
    compared = with_peers(encoder, Method.model_validate({"aligner": aligner}), ensemble, options.batch)
    runs[f"detector, {aligner}, 32 peers"] = functools.partial(run_detector, *compared)
    seconds = measure(runs, options.repetitions, SETTLE)
    where = name_device()
    rows = [
        (name, f"{options.batches * options.batch / value:.2f}", f"{value / seconds['bare encode_image']:.2f}")
        for name, value in seconds.items()
    ]
    print_table(f"{options.model}, batch {options.batch}, {where}", ("run", "images/s", "time / bare"), rows)
    ratio = seconds[f"detector, {aligner}, 32 peers"] / seconds[f"detector, {aligner}"]
    print(f"32 peers take {ratio:.2f} times as long as language alone")
    facts = {
        "model": options.model,
        "batch": options.batch,
        "batches": options.batches,
        "machine": where,
        "seconds": seconds,
    }
    write_results(f"detector-{options.model}-{DEVICE.type}", facts)


def with_peers(
    encoder: Encoder, method: Method, ensemble: PromptEnsemble, batch: int
) -> tuple[Detector, Sequence[PromptEmbeddings]]:
    """A detector, and prompts of a class with 32 peers, for each image of a batch."""
    detector = Detector(encoder, method, None, Peers())
    photos = torch.randint(0, 256, (32, 1, 3, *encoder.preprocess.size), dtype=torch.uint8)
    memory = detector.remember_peers(list(photos), range(32), [str(number) for number in range(32)])
    known = replace(detector.embed(ensemble), peers=replace(memory, calibration=Calibration(0.1, 0.0, 0.0)))
    return detector, [known] * batch


if __name__ == "__main__":
    main()
