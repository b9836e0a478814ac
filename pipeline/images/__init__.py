"""Lists images as manifest rows, decodes photos safely, and makes masks and regions from anomaly maps.

In: an address, the bytes of a photo, an anomaly map. Out: manifest rows, uint8 pixels, masks and regions.
May import: storage, tiling, schemas.
"""

from pipeline.images.budget import FILE_BYTES, PIXELS, give_back_freed_memory
from pipeline.images.decoding import (
    Cut,
    Decoded,
    ImageError,
    decode_image,
    decode_mask,
    decode_thumbnail,
    fit_image,
    measure_image,
    measure_loaded,
)
from pipeline.images.depth import Extremes, Span, choose_span, depth_span, may_be_deep
from pipeline.images.isolation import Isolation
from pipeline.images.layouts import DatasetError, ImageSource, list_images, list_references, open_dataset
from pipeline.images.masks import (
    Mask,
    Region,
    draw_mask,
    encode_empty_mask,
    encode_map,
    encode_mask,
    find_regions,
    split_regions,
    upsample,
)
from pipeline.images.suffixes import describe_left_out
from pipeline.images.tables import GOOD
from pipeline.images.watchdog import HangGuard

__all__ = [
    "FILE_BYTES",
    "GOOD",
    "PIXELS",
    "Cut",
    "DatasetError",
    "Decoded",
    "Extremes",
    "HangGuard",
    "ImageError",
    "ImageSource",
    "Isolation",
    "Mask",
    "Region",
    "Span",
    "choose_span",
    "decode_image",
    "decode_mask",
    "decode_thumbnail",
    "depth_span",
    "describe_left_out",
    "draw_mask",
    "encode_empty_mask",
    "encode_map",
    "encode_mask",
    "find_regions",
    "fit_image",
    "give_back_freed_memory",
    "list_images",
    "list_references",
    "may_be_deep",
    "measure_image",
    "measure_loaded",
    "open_dataset",
    "split_regions",
    "upsample",
]
