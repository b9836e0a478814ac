"""Reads, decodes and scores photos, a batch at a time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pipeline.alfa import Detection, Detector, Pending, PromptEmbeddings
from pipeline.images import Cut, Decoded, ImageError, Isolation, decode_image, fit_image
from pipeline.storage import AddressError, Store, StoreError
from schemas.job import JobConfig
from schemas.tables import ErrorType

_T = TypeVar("_T")


def batches(items: Iterator[_T], size: int) -> Iterator[list[_T]]:
    """Yields lists of `size` items; the last may be shorter."""
    while batch := list(itertools.islice(items, size)):
        yield batch


def batch_size(job: JobConfig) -> int:
    """Returns how many photos are scored at a time: one if method.tile cuts it, because its tiles fill a batch."""
    return 1 if job.method.tile is not None else job.model.batch_size


@dataclass(frozen=True)
class View:
    """What a model sees of a photo. size: height and width in pixels; grid: rows and columns of patches."""

    size: tuple[int, int]
    interpolation: str
    grid: tuple[int, int]

    @classmethod
    def of(cls, detector: Detector) -> View:
        """Returns the view of a detector's model."""
        preprocess = detector.encoder.preprocess
        return cls(preprocess.size, preprocess.interpolation, detector.encoder.grid)

    def options(self, job: JobConfig) -> dict[str, Any]:
        """Returns the arguments of decode_image and its like, for a job."""
        tile = job.method.tile
        return {
            "size": self.size,
            "interpolation": self.interpolation,
            "max_pixels": job.dataset.max_pixels,
            "cut": Cut(self.grid, *(() if tile is None else (tile.size, tile.overlap))),
        }


def view_decoder(job: JobConfig, view: View, isolation: Isolation | None = None) -> Callable[..., Decoded]:
    """Returns a function that decodes the bytes of a file to a view.

    It needs the argument `span` for deep photos. isolation: decodes in another process; None: in this one.
    """
    return functools.partial(decode_image if isolation is None else isolation.decode, **view.options(job))


def image_decoder(job: JobConfig, detector: Detector) -> Callable[..., Decoded]:
    """Returns a function that decodes the bytes of a file to the detector's input; see view_decoder."""
    return view_decoder(job, View.of(detector))


def image_fitter(job: JobConfig, detector: Detector) -> Callable[..., Decoded]:
    """Returns a function that converts an image in memory (and by name the span of a deep one) to the detector's
    input."""
    return functools.partial(fit_image, **View.of(detector).options(job))


def read_image(uri: str, source: Store, decode: Callable[[bytes], _T]) -> _T | ImageError:
    """Reads and decodes an image. Returns an ImageError where the image is at fault.

    Raises StoreError where the store as a whole cannot be used.
    """
    try:
        data = source.read_uri(uri)
    except FileNotFoundError:
        return ImageError(
            ErrorType.VANISHED, f"there is no {uri}; it has gone since it was listed, or its table is wrong"
        )
    except PermissionError as error:
        return ImageError(ErrorType.UNREADABLE, f"{uri} may not be read: {error}")
    except IsADirectoryError:
        return ImageError(ErrorType.NOT_AN_IMAGE, f"{uri} is a folder")
    except AddressError as error:
        return ImageError(ErrorType.UNREADABLE, str(error))
    except StoreError:
        raise
    except OSError as error:
        source.store_of(uri).probe()  # an outage must stop the run: error rows would outlast it
        return ImageError(ErrorType.UNREADABLE, f"{uri} cannot be read, while others can: {error}")
    try:
        return decode(data)
    except ImageError as error:
        return error


def detect(
    detector: Detector, images: Sequence[Decoded], prompts: Sequence[PromptEmbeddings], job: JobConfig
) -> list[Detection]:
    """Scores decoded images: all whole ones in one pass, and those in tiles one after the other."""
    return start(detector, images, prompts, job)()


def start(
    detector: Detector, images: Sequence[Decoded], prompts: Sequence[PromptEmbeddings], job: JobConfig
) -> Pending:
    """Starts scoring as detect does. Returns a function that waits for the device and returns the detections."""
    if not images:
        return list
    whole = [number for number, image in enumerate(images) if image.tiles is None]
    waiting: list[tuple[list[int], Pending]] = []
    if whole:
        pixels = to_tensor([images[number].pixels for number in whole])
        waiting.append((whole, detector.start(pixels, [prompts[number] for number in whole])))
    for number, image in enumerate(images):
        if image.tiles is not None and image.tiling is not None:
            views = to_tensor([image.pixels, *image.tiles])
            tiled = detector.start_tiled(views[0], views[1:], image.tiling, prompts[number], job.model.batch_size)
            waiting.append(([number], tiled))

    def conclude() -> list[Detection]:
        found = {number: item for numbers, ready in waiting for number, item in zip(numbers, ready(), strict=True)}
        return [found[number] for number in range(len(images))]

    return conclude


def to_tensor(pixels: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
    """Stacks B images [H, W, 3] into a tensor [B, 3, H, W], uint8."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
