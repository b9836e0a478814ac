"""Measures anomalib's own WinCLIP, zero-shot, as its users run it: Engine.predict on a folder of photos.

It runs in an environment of its own, which has anomalib and no alfa; README.md has the commands. Weights are random, as
only speed matters here: they are made where the file is missing, and alfa takes the same file.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from unittest import mock

import open_clip
import torch
from anomalib.engine import Engine
from anomalib.models import WinClip
from anomalib.models.image.winclip import torch_model


def make_weights(file: Path) -> None:
    torch.manual_seed(0)
    torch.save(open_clip.create_model(torch_model.BACKBONE).state_dict(), file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder")
    parser.add_argument("weights", type=Path, help="file of random weights, made if it is missing")
    parser.add_argument("--class-name", default="part")
    options = parser.parse_args()
    if not options.weights.exists():
        make_weights(options.weights)
    torch_model.PRETRAINED = str(options.weights)  # instead of a download
    count = sum(1 for path in options.photos.iterdir() if path.is_file())
    with tempfile.TemporaryDirectory() as folder:
        model, engine = WinClip(class_name=options.class_name), Engine(default_root_dir=folder)
        # its thresholds would need labelled photos, whose scoring is not counted here
        with mock.patch.object(Engine, "_should_run_validation", return_value=False):
            started = time.perf_counter()
            engine.predict(model=model, data_path=options.photos)
            seconds = time.perf_counter() - started
    print(f"WinCLIP of anomalib: {count} photos in {seconds:.1f} s, {count / seconds:.3f} images/s")


if __name__ == "__main__":
    main()
