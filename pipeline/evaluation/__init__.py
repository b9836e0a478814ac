"""Measures scores and maps against ground truth: metrics, their documents, and calibrated thresholds.

In: labelled images or finished runs. Out: AUROC, AUPR, F1-max, PRO, curves, threshold tables.
May import: scoring, alfa, images, storage, schemas.
"""

from pipeline.evaluation.calibration import calibrate_class, check_policy, merge_scores, read_scores
from pipeline.evaluation.document import HEADERS, Block, Picture, metric_cells, published_cells, to_html, to_markdown
from pipeline.evaluation.draws import average_draws, draw_night, first_draws
from pipeline.evaluation.measure import LabelledImage, Score, measure
from pipeline.evaluation.published import PUBLISHED, TITLES, Benchmark
from pipeline.evaluation.report import Evaluation, compose, facts
from pipeline.evaluation.score import Scored, Variant, group_variants, labelled_images, read_run, score_variants

__all__ = [
    "HEADERS",
    "PUBLISHED",
    "TITLES",
    "Benchmark",
    "Block",
    "Evaluation",
    "LabelledImage",
    "Picture",
    "Score",
    "Scored",
    "Variant",
    "average_draws",
    "calibrate_class",
    "check_policy",
    "compose",
    "draw_night",
    "facts",
    "first_draws",
    "group_variants",
    "labelled_images",
    "measure",
    "merge_scores",
    "metric_cells",
    "published_cells",
    "read_run",
    "read_scores",
    "score_variants",
    "to_html",
    "to_markdown",
]
