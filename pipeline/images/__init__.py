"""Layouts of image datasets -> manifest rows, streamed; and safe decoding."""

from pipeline.images.decoding import Cut, Decoded, ImageError, decode_image, decode_mask, decode_thumbnail
from pipeline.images.hanging import HangGuard
from pipeline.images.isolation import decode_isolated
from pipeline.images.layouts import GOOD, DatasetError, ImageSource, list_images, list_references, open_dataset

__all__ = [
    "GOOD",
    "Cut",
    "DatasetError",
    "Decoded",
    "HangGuard",
    "ImageError",
    "ImageSource",
    "decode_image",
    "decode_isolated",
    "decode_mask",
    "decode_thumbnail",
    "list_images",
    "list_references",
    "open_dataset",
]
