"""What ALFA costs over CLIP alone: the detector against a bare encode_image loop, side by side in one process.

Runs interleave and medians are compared, so that a busy machine slows both alike. Imports no Ray. The model has random
weights: only its speed is looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import datetime, timezone

import open_clip
import torch

from pipeline.alfa import Detector, Encoder, Preprocess
from pipeline.prompts.compose import compose_ensemble
from schemas.job import Method
from schemas.prompts import PromptSet
from tests.bench.measuring import measure, print_table, write_results


def build(name: str, device: torch.device, dtype: torch.dtype) -> tuple[open_clip.CLIP, Encoder]:
    """A model with random weights, bare and as alfa's encoder."""
    clip = open_clip.create_model(name, device=device).eval().requires_grad_(False)
    preprocess = Preprocess(
        clip.visual.image_size, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, "bicubic"
    )
    return clip, Encoder(clip, open_clip.get_tokenizer(name), preprocess, device, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    clip, encoder = build(options.model, device, dtype)
    pixels = torch.randint(0, 256, (options.batch, 3, *encoder.preprocess.size), dtype=torch.uint8)
    ready = pixels.to(device).float()
    now = datetime.now(timezone.utc)
    prompt_set = PromptSet(class_name="part", source="base", recipe="bench", created_at=now)
    ensemble = compose_ensemble(prompt_set, lambda _: True)

    def bare() -> object:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return clip.encode_image(ready)

    runs: dict[str, Callable[[], object]] = {"bare encode_image": bare}
    for aligner in ("raw", "value", "ridge"):
        detector = Detector(encoder, Method(), aligner)
        prompts = [detector.embed(ensemble)] * options.batch
        runs[f"detector, {aligner}"] = lambda detector=detector, prompts=prompts: detector.detect(pixels, prompts)
    seconds = measure(runs, options.repetitions, torch.cuda.synchronize if device.type == "cuda" else None)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rows = [
        (name, f"{options.batch / value:.2f}", f"{value / seconds['bare encode_image']:.2f}")
        for name, value in seconds.items()
    ]
    print_table(f"{options.model}, batch {options.batch}, {where}", ("run", "images/s", "time / bare"), rows)
    facts = {"model": options.model, "batch": options.batch, "machine": where, "seconds": seconds}
    write_results(f"detector-{device.type}", facts)


if __name__ == "__main__":
    main()
