"""Measures OpenVINO beside torch on a CPU: the image encoder in fp32 and in int8, as to speed and scores.

It needs the packages openvino and nncf, which alfa does not install. int8 is NNCF's quantization after training, of a
transformer, with some of the photos as its examples. Scores are zero-shot, of the embedded model: image AUROC, and how
far scores move. For another model, whose weights are random here, only the speed is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import nncf
import numpy as np
import openvino
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from pipeline.alfa import Detector, load_encoder, locate_weights
from pipeline.alfa.encoder import Encoder, ImageFeatures
from pipeline.images import list_images, open_dataset
from pipeline.prompts import compose_ensemble, make_offline
from pipeline.scoring import batches, detect, image_decoder, to_tensor
from schemas.job import EMBEDDED_MODEL, Dataset, Method, Storage, parse_job
from tests.bench.measuring import measure, print_table, write_results
from tests.bench.models import build

EXAMPLES = 48
"""Photos that the quantization looks at."""

AXES = (0, 0, 1)
"""The axis of the images in each output of Traced."""


class Traced(nn.Module):
    """The image encoder with the options of a detector."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        detector = self.detector
        found = detector.encoder.encode_images(pixels, detector._levels, detector._value_depth)
        return found.embedding, found.embedded, found.tokens if found.values is None else found.values


def run_compiled(model: openvino.CompiledModel, batch: int) -> Callable[..., ImageFeatures]:
    """Encoder.encode_images by a compiled model, which takes whole batches alone."""

    def encode(pixels: Tensor, levels: object = (), value_depth: int | None = None, _: object = ()) -> ImageFeatures:
        parts: list[list[np.ndarray]] = [[], [], []]
        for some in pixels.split(batch):
            full = torch.cat([some, some[:1].expand(batch - len(some), -1, -1, -1)]).contiguous()
            found = model(full.numpy())
            for place, axis in enumerate(AXES):
                parts[place].append(np.take(found[place], range(len(some)), axis))
        joined = [torch.from_numpy(np.concatenate(values, axis)) for values, axis in zip(parts, AXES, strict=True)]
        embedding, embedded, layers = joined
        kept = (None, layers) if value_depth else (layers, None)
        return ImageFeatures(embedding, embedded, *kept, embedded.new_empty(0, *embedded[:, 1:].shape))

    return encode


def score_class(detector: Detector, encode: Callable[..., ImageFeatures], images: list, prompts: object, job: object):
    detector.encoder.encode_images = encode
    return np.array(
        [
            found.score
            for some in batches(iter(images), 32)
            for found in detect(detector, some, [prompts] * len(some), job)
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", help="folders of labelled photos, each of a layout that alfa knows")
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    job = parse_job({"dataset": {"images": "x"}, "output": {"uri": "y"}, "model": {"device": "cpu"}})
    real = options.model == EMBEDDED_MODEL
    encoder: Encoder = load_encoder(job.model, locate_weights(job.model)) if real else build(options.model)[1]
    detector = Detector(encoder, job.resolved_method if real else Method())
    decode = image_decoder(job, detector)
    classes: dict[str, list] = {}
    for folder in options.photos:
        source = open_dataset(Dataset(images=folder), Storage())
        for row in (row for listed in list_images(source) for row in listed.to_pylist()):
            classes.setdefault(row["class_name"], []).append((row["label"], decode(source.store.read_uri(row["uri"]))))
    every = [photo.pixels for photos in classes.values() for _, photo in photos]
    examples = [to_tensor(some) for some in batches(iter(every[:: max(1, len(every) // EXAMPLES)]), options.batch)]
    examples = [one for one in examples if len(one) == options.batch]
    in_torch = encoder.encode_images
    with torch.no_grad():
        model = openvino.convert_model(Traced(detector), example_input=examples[0])
    small = nncf.quantize(
        model,
        nncf.Dataset([one.numpy() for one in examples]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(examples),
    )
    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})
    compiled = {name: core.compile_model(one, "CPU") for name, one in {"fp32": model, "int8": small}.items()}
    pixels = examples[0].contiguous()
    runs = {"torch": lambda: in_torch(pixels, detector._levels, detector._value_depth)}
    runs |= {f"OpenVINO {name}": (lambda one=one: one(pixels.numpy())) for name, one in compiled.items()}
    seconds = measure(runs, options.repetitions)
    rows = [(name, f"{s / options.batch * 1e3:.0f}", f"{seconds['torch'] / s:.2f}") for name, s in seconds.items()]
    print_table(f"{options.model}, batch {options.batch}", ("image encoder", "ms an image", "times as fast"), rows)
    facts: dict[str, object] = {"model": options.model, "batch": options.batch, "seconds": seconds}
    if real:
        ways = {"torch": in_torch} | {name: run_compiled(one, options.batch) for name, one in compiled.items()}
        lines = []
        for class_name, photos in classes.items():
            prompts = detector.embed(compose_ensemble(make_offline(class_name), lambda _: True))
            labels, images = zip(*photos, strict=True)
            scores = {name: score_class(detector, way, list(images), prompts, job) for name, way in ways.items()}
            for name, found in scores.items():
                auroc, apart = (
                    100 * roc_auc_score([label != "good" for label in labels], found),
                    abs(found - scores["torch"]),
                )
                lines.append(
                    (class_name, name, str(len(found)), f"{auroc:.2f}", f"{apart.max():.4f}", f"{apart.mean():.4f}")
                )
        print_table("zero-shot scores", ("class", "by", "photos", "AUROC", "apart at most", "on average"), lines)
        facts["scores"] = lines
    write_results("openvino_int8", facts)


if __name__ == "__main__":
    main()
