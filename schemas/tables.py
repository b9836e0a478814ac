"""The tables as Arrow schemas. The metadata of each field holds its meaning and unit (key `doc`).

Schemas only ever gain nullable columns; each such change raises SCHEMA_VERSION.
"""

from __future__ import annotations

from enum import Enum

import pyarrow as pa

SCHEMA_VERSION = 3

FENCE = 0.5
"""The score of an image at the fence of its class, if it was compared with peers."""


class ErrorType(str, Enum):
    """The values of `error_type`: why an image has no score."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_MANY_PIXELS = "too_many_pixels"
    VANISHED = "vanished"
    UNREADABLE = "unreadable"
    CRASHED = "crashed"
    INTERNAL = "internal"


def _field(name: str, kind: pa.DataType, doc: str, *, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"doc": doc})


_TIMESTAMP = pa.timestamp("us", tz="UTC")

MANIFEST = pa.schema(
    [
        _field("uri", pa.string(), "where the image is", nullable=False),
        _field("key", pa.string(), "its path below the dataset's root; names its mask", nullable=False),
        _field("class_name", pa.string(), "class of the part", nullable=False),
        _field("size", pa.int64(), "bytes; null where the listing does not say"),
        _field("etag", pa.string(), "ETag of the object, or mtime and size of a local file; null where unknown"),
        _field("image_id", pa.string(), "hash of uri and etag, 32 hex digits", nullable=False),
        _field("label", pa.string(), "ground truth: good, or the kind of defect; null where unknown"),
        _field("mask_uri", pa.string(), "ground truth mask; null where there is none"),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)

_REGION = pa.struct(
    [
        _field("x", pa.int32(), "left edge, pixels of the source image"),
        _field("y", pa.int32(), "top edge, pixels of the source image"),
        _field("width", pa.int32(), "pixels"),
        _field("height", pa.int32(), "pixels"),
        _field("area", pa.int64(), "pixels of the mask in this region"),
        _field("peak", pa.float32(), "highest value of the anomaly map in it: 0 to 1, to 2 with references alone"),
        _field("defect", pa.string(), "name of the nearest described defect; null where only base prompts exist"),
        _field("peer_uri", pa.string(), "the peer that is most alike in this region; null without peers"),
    ]
)

_EXPLANATION = pa.struct(
    [
        _field("prompt", pa.string(), "anomalous prompt that was kept"),
        _field("defect", pa.string(), "name of the defect that it describes; null for base prompts"),
        _field("weight", pa.float32(), "share of the prompt in the anomalous prototype, 0 to 1"),
        _field("similarity", pa.float32(), "cosine of image and prompt, -1 to 1"),
    ]
)

SCORES = pa.schema(
    [
        _field("image_id", pa.string(), "hash of uri and etag, 32 hex digits", nullable=False),
        _field("image_uri", pa.string(), "where the image was read", nullable=False),
        _field("image_etag", pa.string(), "version of the image that was read; null where unknown"),
        _field("run_id", pa.string(), "run_date and fingerprint of what determines the result", nullable=False),
        _field("shard_id", pa.string(), "shard that the image was scored in", nullable=False),
        _field("width", pa.int32(), "pixels, after EXIF orientation; null on error"),
        _field("height", pa.int32(), "pixels, after EXIF orientation; null on error"),
        _field("status", pa.string(), "ok or error", nullable=False),
        _field("error_type", pa.string(), "one of schemas.tables.ErrorType; null when ok"),
        _field("error_message", pa.string(), "what failed, for a person; null when ok"),
        _field(
            "score",
            pa.float32(),
            "unified anomaly score S = (1 - w) global + w local, raw, 0 to 1; (S + score_reference) / 2 with "
            "references; with peers combined with score_peers, and 0.5 is the fence of the class; null on error",
        ),
        _field("score_global", pa.float32(), "softmax probability of the anomalous prototype for the whole image"),
        _field("score_local", pa.float32(), "mean of the k highest patches of the anomaly map from language alone"),
        _field("threshold", pa.float32(), "score from which the image counts as anomalous"),
        _field("mask_threshold", pa.float32(), "map value from which a pixel counts as anomalous"),
        _field("is_anomalous", pa.bool_(), "score >= threshold; null on error"),
        _field("mask_uri", pa.string(), "8-bit PNG, 0 or 255, of the size of the source image; null on error"),
        _field("map_uri", pa.string(), "16-bit PNG, value / 65535 is the anomaly map, cut at 1; null unless asked for"),
        _field("mask_area", pa.float32(), "share of pixels that the mask marks, 0 to 1"),
        _field("regions", pa.list_(_REGION), "connected regions (8 neighbours) of the mask, highest peak first"),
        _field("explanation", pa.list_(_EXPLANATION), "kept anomalous prompts by weight x similarity, best first"),
        _field("prompts_kept_normal", pa.int32(), "normal prompts left after adaptation"),
        _field("prompts_kept_anomalous", pa.int32(), "anomalous prompts left after adaptation"),
        _field("prompt_source", pa.string(), "llm, bundled or base"),
        _field("prompt_fingerprint", pa.string(), "hash of the prompts' texts, edits included"),
        _field("model", pa.string(), "open_clip model and pretrained tag or file name", nullable=False),
        _field("weights_sha256", pa.string(), "SHA-256 of the weights file", nullable=False),
        _field("scored_at", _TIMESTAMP, "when the row was made", nullable=False),
        _field("shots", pa.int32(), "reference images that it was compared with, 0: zero-shot; null on error"),
        _field("score_reference", pa.float32(), "distance of its farthest patch to the references, 0 to 1; else null"),
        _field("map_peak", pa.float32(), "highest patch of the anomaly map, what mask thresholds are set by"),
        _field("threshold_source", pa.string(), "policy of the thresholds; with labels, their table too"),
        _field("bit_depth", pa.int32(), "bits of a channel taken as black to white; null of fractions and on error"),
        _field("frames", pa.int32(), "frames or pages of the file, of which the first is scored; null where unknown"),
        _field("clipped", pa.int64(), "pixels with values beyond bit_depth, cut to black or white; null on error"),
        _field("tiles", pa.int32(), "tiles that it was scored in, 1: as a whole; null on error"),
        _field("score_peers", pa.float32(), "part of the peers in score, 0 to 1; null without peers"),
        _field("peers", pa.int32(), "photos of the night that it was compared with, 0: too few; null on error"),
        _field("peers_earlier", pa.int32(), "how many of the peers are photos of earlier nights; null on error"),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)
"""The published table, one row per image. Its partition columns run_date and class_name are in the path alone."""

SHARD = pa.schema(
    [
        _field("class_name", pa.string(), "class of the part", nullable=False),
        _field("image_key", pa.string(), "path of the image below the dataset's root", nullable=False),
        *SCORES,
        _field("prompts_kept", pa.list_(pa.bool_()), "which prompts adaptation has left, in the order of prompts.json"),
        _field(
            "grid",
            pa.list_(pa.float32()),
            "anomaly map on the patch grid, by row; 0 to 1, to 2 with references alone",
        ),
        _field("grid_width", pa.int32(), "columns of the patch grid"),
        _field("defect_names", pa.list_(pa.string()), "described defects of the class"),
        _field("defect_grid", pa.list_(pa.float32()), "similarity of each patch with each defect: defect, row, column"),
        _field("defect_grid_width", pa.int32(), "columns of defect_grid, where they are not those of grid"),
        _field("peer_uris", pa.list_(pa.string()), "where the peers of the class were read; null without peers"),
        _field("peer_grid", pa.list_(pa.int16()), "for each patch of grid, which of peer_uris is most alike there"),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)
"""A finished shard in runs/: the rows of the table, and the values from which masks are made."""

LEDGER = pa.schema(
    [
        _field("photo", pa.binary(16), "image_id, as bytes", nullable=False),
        _field(
            "scored_as",
            pa.string(),
            "fingerprint of class, model, weights, method, prompts and references",
            nullable=False,
        ),
        _field("ok", pa.bool_(), "whether the photo has a score; else its row is an error", nullable=False),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)
"""The photos of a night, in ledger/: nights with `dataset.select: new` leave out the photos that it lists."""

_METRIC_DOCS = {
    "image_auroc": "area under the ROC curve of image scores, exact",
    "image_aupr": "average precision of image scores, exact",
    "image_f1_max": "highest F1 of image scores over all thresholds, exact",
    "pixel_auroc": "area under the ROC curve of map values at the size of the ground truth",
    "pixel_aupr": "average precision of map values",
    "pixel_f1_max": "highest F1 of map values over all thresholds",
    "pixel_pro": "mean share of a defect region (8 neighbours) that is found, over false positive rates 0 to 0.3, "
    "divided by 0.3",
}

EVALUATION = pa.schema(
    [
        _field("configuration", pa.string(), "what was evaluated: base, or what differs from it", nullable=False),
        _field("level", pa.string(), "mean (over classes), class, or defect (of a class)", nullable=False),
        _field("class_name", pa.string(), "class of the part; null for the mean"),
        _field("label", pa.string(), "kind of defect, against all good images of the class; null for all kinds"),
        _field("good", pa.int64(), "good images", nullable=False),
        _field("anomalous", pa.int64(), "anomalous images", nullable=False),
        _field("errors", pa.int64(), "images without a score, left out", nullable=False),
        _field(
            "unmasked", pa.int64(), "anomalous images without a usable mask, left out of pixel metrics", nullable=False
        ),
        *(_field(name, pa.float64(), f"{doc}; null where one side is missing") for name, doc in _METRIC_DOCS.items()),
        *(
            _field(f"{name}_error", pa.float64(), f"the exact {name} lies within this of the value (binning)")
            for name in _METRIC_DOCS
            if name.startswith("pixel")
        ),
        _field("false_positive_rate", pa.float64(), "share of good images at or above threshold.value, if it is fixed"),
        _field("recall", pa.float64(), "share of anomalous images at or above threshold.value, if it is fixed"),
        _field("draws", pa.int64(), "nights that the peers were drawn from; null where they were not drawn"),
        *(
            _field(f"{name}_spread", pa.float64(), f"standard deviation of {name} over the draws")
            for name in _METRIC_DOCS
        ),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)
"""Metrics of an evaluation against ground truth, all between 0 and 1."""

EVALUATED_IMAGES = pa.schema(
    [
        _field("configuration", pa.string(), "what was evaluated: base, or what differs from it", nullable=False),
        _field("class_name", pa.string(), "class of the part", nullable=False),
        _field("image_key", pa.string(), "path of the image below the dataset's root", nullable=False),
        _field("image_uri", pa.string(), "where the image was read", nullable=False),
        _field("label", pa.string(), "ground truth: good, or the kind of defect", nullable=False),
        _field("score", pa.float32(), "unified anomaly score; null where the image could not be scored"),
        _field("score_global", pa.float32(), "its global part"),
        _field("score_local", pa.float32(), "its local part"),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)
"""The labelled images of an evaluation with their scores, from which thresholds can be calibrated."""
