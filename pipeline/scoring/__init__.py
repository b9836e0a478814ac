"""Turns a manifest into scored rows: shards, batches, masks, references, peers and thresholds of a run.

In: manifest, run, detector, prompts. Out: one Parquet file per shard; the shard is finished once it is there.
ZeroShotDetector is for programs that want scores without a run.
May import: alfa, prompts, images, storage, tiling, schemas.
"""

from pipeline.scoring.batches import View, batch_size, batches, detect, image_decoder, read_image, to_tensor
from pipeline.scoring.choice import LowestIds
from pipeline.scoring.memories import (
    CANDIDATES_PER_PEER,
    Neighbours,
    PreparedClasses,
    make_memory,
    prepare_class,
)
from pipeline.scoring.reading import Decoders, PhotoReader, Row
from pipeline.scoring.references import choose_references, describe_choice
from pipeline.scoring.scorer import ShardStats, mask_shard, score_shard
from pipeline.scoring.shards import Manifest, Shard, cut_shards, identify_shards, write_manifest
from pipeline.scoring.spans import (
    SAMPLE_COLUMNS,
    RunSpans,
    Spans,
    choose_samples,
    read_spans,
    sample_photos,
    write_samples,
)
from pipeline.scoring.thresholds import (
    ThresholdError,
    Thresholds,
    fixed_thresholds,
    parse_table,
    quantile_thresholds,
    reference_thresholds,
    require_two,
    select_thresholds,
)
from pipeline.scoring.zero_shot import Prediction, ZeroShotDetector

__all__ = [
    "CANDIDATES_PER_PEER",
    "SAMPLE_COLUMNS",
    "Decoders",
    "LowestIds",
    "Manifest",
    "Neighbours",
    "PhotoReader",
    "Prediction",
    "PreparedClasses",
    "Row",
    "RunSpans",
    "Shard",
    "ShardStats",
    "Spans",
    "ThresholdError",
    "Thresholds",
    "View",
    "ZeroShotDetector",
    "batch_size",
    "batches",
    "choose_references",
    "choose_samples",
    "cut_shards",
    "describe_choice",
    "detect",
    "fixed_thresholds",
    "identify_shards",
    "image_decoder",
    "make_memory",
    "mask_shard",
    "parse_table",
    "prepare_class",
    "quantile_thresholds",
    "read_image",
    "read_spans",
    "reference_thresholds",
    "require_two",
    "sample_photos",
    "score_shard",
    "select_thresholds",
    "to_tensor",
    "write_manifest",
    "write_samples",
]
