"""Layouts of image datasets -> manifest rows, streamed; and safe decoding."""

from pipeline.images.decoding import Decoded, ImageError, decode_image, decode_mask, decode_thumbnail
from pipeline.images.isolation import decode_isolated
from pipeline.images.layouts import GOOD, DatasetError, ImageSource, list_images, open_dataset

__all__ = [
    "GOOD",
    "DatasetError",
    "Decoded",
    "ImageError",
    "ImageSource",
    "decode_image",
    "decode_isolated",
    "decode_mask",
    "decode_thumbnail",
    "list_images",
    "open_dataset",
]
