"""The entry point for programs: scores photos in this process, without Ray, a store or an LLM."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.alfa import (
    Detection,
    Detector,
    Evidence,
    ModelError,
    PromptEmbeddings,
    load_encoder,
    locate_weights,
    text_fits,
)
from pipeline.images import (
    Decoded,
    Extremes,
    ImageError,
    Region,
    Span,
    choose_span,
    depth_span,
    draw_mask,
    find_regions,
    may_be_deep,
    measure_image,
    measure_loaded,
    upsample,
)
from pipeline.prompts import compose_ensemble, make_offline
from pipeline.scoring.batches import batch_size, batches, detect, image_decoder, image_fitter
from pipeline.scoring.spans import spread
from schemas.job import EMBEDDED_MODEL, JobConfig, Method, parse_job
from schemas.prompts import PromptEnsemble, PromptSet

Photo: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""The path of a file, its bytes, a Pillow image, or RGB pixels [height, width, 3] (grey: [height, width]), uint8."""

_HEAD = 32
"""Bytes of a file by which may_be_deep tells."""
_Photo = TypeVar("_Photo", bound=Photo)
_CLASSES_KEPT = 64
"""Number of classes whose encoded prompts a detector keeps."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """The result for one photo.

    score: 0 to 1, higher is more anomalous; raw, so compare scores within a class only. width, height: of the upright
    photo in pixels. regions: connected parts of the mask, the highest peak first. grid: the anomaly map on the patch
    grid, [rows, columns]. explanation: the prompts that decided, the most important first. bit_depth: bits of a channel
    that were taken as black to white; None for fractions. clipped: pixels with values beyond it.
    """

    score: float
    threshold: float
    width: int
    height: int
    regions: tuple[Region, ...]
    grid: NDArray[np.float32]
    explanation: tuple[Evidence, ...]
    bit_depth: int | None
    clipped: int

    @property
    def is_anomalous(self) -> bool:
        """Whether the score reaches the threshold."""
        return self.score >= self.threshold

    @property
    def defect(self) -> str | None:
        """The defect that best fits the strongest region; None if there is no region, or the class is not described."""
        return self.regions[0].defect if self.regions else None

    @functools.cached_property
    def map(self) -> NDArray[np.float32]:
        """The anomaly map at the photo's size [height, width], float32; computed on first use."""
        return upsample(self.grid, self.width, self.height)

    @functools.cached_property
    def mask(self) -> NDArray[np.bool_]:
        """The pixels at which the map reaches the threshold, bool [height, width]."""
        return self.map >= self.threshold


class ZeroShotDetector:
    """Scores photos of any class by language alone. Create it with from_pretrained."""

    def __init__(self, job: JobConfig) -> None:
        """job: only its model, method, dataset.max_pixels, dataset.bit_depth and threshold.value are used; nothing is
        listed or written.

        Raises ModelError where the model or its weights cannot be used.
        """
        self._job = job
        self._weights = locate_weights(job.model)
        self._detector = Detector(load_encoder(job.model, self._weights), job.resolved_method)
        self._decode = image_decoder(job, self._detector)
        self._fit = image_fitter(job, self._detector)
        self._fits = text_fits(job.model)
        self._spans: dict[str, Span] = {}
        self._prompts_of = functools.lru_cache(_CLASSES_KEPT)(self._embed)

    @classmethod
    def from_pretrained(
        cls,
        name: str = EMBEDDED_MODEL,
        tag: str | None = None,
        *,
        image_size: int | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        method: Method | None = None,
        threshold: float = 0.5,
        bit_depth: Literal[8, 10, 12, 14, 16] | None = None,
    ) -> ZeroShotDetector:
        """Loads any open_clip ViT; by default the model that comes with alfa, which needs no network.

        Args:
            name: name of the model.
            tag: open_clip's pretrained tag, downloaded on first use, or the path of a weights file; required unless the
                model is the embedded one.
            image_size: side of the model's input in pixels; default: the model's own.
            device: auto takes a GPU if there is one.
            method: options of the method; default: those of a job.
            threshold: score, and map value, from which a photo and a pixel count as anomalous.
            bit_depth: bits of deep photos that do not say it themselves; default: the smallest depth that holds a
                sample of the first list of photos of their class that has deep ones.

        Raises JobError for options that do not go together, ModelError where the model or its weights cannot be used.
        """
        document = {
            "dataset": {"images": "given to predict", "bit_depth": bit_depth},
            "output": {"uri": "returned by predict"},
            "model": {"name": name, "pretrained": tag, "image_size": image_size, "device": device},
            "method": {} if method is None else method.model_dump(),
            "threshold": {"value": threshold},
        }
        return cls(parse_job(document))

    @overload
    def predict(
        self, photos: list[_Photo], class_name: str, prompts: PromptSet | PromptEnsemble | None = None
    ) -> list[Prediction]: ...

    @overload
    def predict(
        self, photos: Photo, class_name: str, prompts: PromptSet | PromptEnsemble | None = None
    ) -> Prediction: ...

    def predict(
        self,
        photos: Photo | list[_Photo],
        class_name: str,
        prompts: PromptSet | PromptEnsemble | None = None,
    ) -> Prediction | list[Prediction]:
        """Scores a photo, or each photo of a list, of one class.

        class_name: an English name, such as `hazelnut` or `metal_nut`. prompts: a description of normal and defective
        parts, such as a prompt set of the lake; default: the bundled description of the class where there is one (MVTec
        AD and VisA), else the base ensemble. Raises OSError where a file cannot be read, ImageError where it is not an
        image, ValueError for an array of the wrong type or shape.
        """
        known = self._prompts_of(class_name, prompts)
        if isinstance(photos, list):
            return list(self._predict(photos, known, self._span_of(class_name, photos)))
        (prediction,) = self._predict([photos], known, self._span_of(class_name, [photos]))
        return prediction

    def _span_of(self, class_name: str, photos: Sequence[Photo]) -> Span | None:
        """What is black and white in deep photos of a class; None as long as it has none."""
        if self._job.dataset.bit_depth is not None:
            return depth_span(self._job.dataset.bit_depth)
        if class_name not in self._spans:
            found = [extremes for photo in spread(photos) if (extremes := self._measure(photo)) is not None]
            if found:
                self._spans[class_name] = choose_span(found)
        return self._spans.get(class_name)

    def _measure(self, photo: Photo) -> Extremes | None:
        """The extreme values of a deep photo; None of others, and of what _open will refuse."""
        if isinstance(photo, np.ndarray):
            return None
        if isinstance(photo, Image.Image):
            return measure_loaded(photo)
        try:
            if isinstance(photo, bytes):
                data = photo
            else:
                with open(photo, "rb") as file:
                    head = file.read(_HEAD)
                    data = head + file.read() if may_be_deep(head) else b""
            return measure_image(data, max_pixels=self._job.dataset.max_pixels) if may_be_deep(data) else None
        except (OSError, ImageError):
            return None

    def _predict(self, photos: Sequence[Photo], prompts: PromptEmbeddings, span: Span | None) -> Iterator[Prediction]:
        for batch in batches(iter(photos), batch_size(self._job)):
            images = [self._open(photo, span) for photo in batch]
            detections = detect(self._detector, images, [prompts] * len(images), self._job)
            for image, detection in zip(images, detections, strict=True):
                yield self._to_prediction(image, detection, prompts)

    def _open(self, photo: Photo, span: Span | None) -> Decoded:
        if isinstance(photo, Image.Image):
            return self._fit(photo, span=span)
        if isinstance(photo, np.ndarray):
            return self._fit(_from_array(photo))
        if isinstance(photo, bytes):
            return self._decode(photo, span=span)
        try:
            return self._decode(Path(photo).read_bytes(), span=span)
        except ImageError as error:
            raise ImageError(error.error_type, f"{os.fspath(photo)}: {error.message}") from None

    def _to_prediction(self, image: Decoded, detection: Detection, prompts: PromptEmbeddings) -> Prediction:
        if not (np.isfinite(detection.score) and np.isfinite(detection.grid).all()):
            raise ModelError(f"{self._weights.label} gave a score that is not a number; check the weights")
        threshold, width, height = self._job.threshold.value, image.source_width, image.source_height
        regions: list[Region] = []
        if (detection.grid >= threshold).any():  # the map is interpolated, so it never exceeds the patches
            mask = draw_mask(detection.grid, width, height, threshold)
            regions = find_regions(mask, prompts.defects, detection.defect_grid)
        return Prediction(
            score=detection.score,
            threshold=threshold,
            width=width,
            height=height,
            regions=tuple(regions),
            grid=detection.grid,
            explanation=detection.explanation,
            bit_depth=image.bit_depth,
            clipped=image.clipped,
        )

    def _embed(self, class_name: str, prompts: PromptSet | PromptEnsemble | None) -> PromptEmbeddings:
        if not isinstance(prompts, PromptEnsemble):
            prompts = compose_ensemble(prompts or make_offline(class_name), self._fits)
        return self._detector.embed(prompts)


def _from_array(pixels: NDArray[np.uint8]) -> Image.Image:
    """Makes an image of pixels as Photo describes them. Raises ValueError for another type or shape."""
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ValueError(
            f"pixels must be uint8, [height, width, 3] (RGB) or [height, width] (grey); these are {pixels.dtype} "
            f"{list(pixels.shape)}"
        )
    return Image.fromarray(pixels)
