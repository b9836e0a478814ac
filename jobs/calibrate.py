"""`alfa calibrate`: sets each class's thresholds from the scores of finished runs, and writes them to a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timezone

from rich.console import Console
from rich.markup import escape

from jobs.console import make_table, print_line
from pipeline.evaluation import calibrate_class, check_policy, merge_scores, read_scores
from pipeline.scoring import ThresholdError
from pipeline.storage import Store, open_store, paths
from schemas.job import JobConfig, Storage, parse_job, read_job_yaml
from schemas.thresholds import ThresholdTable

logger = logging.getLogger(__name__)

_ENOUGH_IMAGES = 50
"""With fewer good images, a false-positive rate of a few per cent is a guess."""


def run_calibrate(
    output: Store,
    run_ids: Sequence[str],
    table: str,
    policy: str,
    *,
    all_good: bool,
    storage: Storage,
    console: Console,
) -> int:
    """Writes the thresholds of every class of the runs to a JSON file. Returns the exit code.

    table: path or URI of the file. policy: f1_max or fpr=RATE. all_good: the images of the runs are known to be good.
    Raises ThresholdError if the runs were scored with different options, or have too few images.
    """
    check_policy(policy)
    jobs = [_read_job(output, run_id) for run_id in run_ids]
    runs = [read_scores(output, run_id, all_good=all_good) for run_id in run_ids]
    for run_id, job, run in zip(run_ids, jobs, runs, strict=True):
        if (job.scoring_facts(), run.weights_sha256) != (jobs[0].scoring_facts(), runs[0].weights_sha256):
            raise ThresholdError(
                f"run {run_id} was scored with another model, method or references than {run_ids[0]}, so their scores "
                f"cannot share a threshold; calibrate each run on its own"
            )
    classes = {name: calibrate_class(name, scores, policy) for name, scores in merge_scores(runs).items()}
    result = ThresholdTable(
        policy=policy,
        run_ids=tuple(run_ids),
        model=runs[0].model,
        weights_sha256=runs[0].weights_sha256,
        scoring=jobs[0].scoring_facts(),
        created_at=datetime.now(timezone.utc),
        classes=classes,
    )
    folder, _, name = table.rpartition("/")
    store = open_store(folder or ".", storage)
    store.write(name, result.model_dump_json(indent=2).encode() + b"\n")
    _print(result, console)
    print_line(console, f"written to {store.uri(name)}; name it in a job:")
    print_line(console, f"  threshold: {{policy: labels, table: {store.uri(name)}}}")
    for name, found in classes.items():
        if policy != "f1_max" and found.good < _ENOUGH_IMAGES:
            logger.warning(
                "class %s has only %d good images, so its false-positive rate is a rough guess", name, found.good
            )
    return 0


def _read_job(output: Store, run_id: str) -> JobConfig:
    try:
        return parse_job(read_job_yaml(output.read(paths.run_key(run_id, "job.yaml")).decode()))
    except FileNotFoundError:
        where = output.uri("")
        raise ThresholdError(f"{where} has no run {run_id}; `alfa status {where}` lists the runs") from None


def _print(table: ThresholdTable, console: Console) -> None:
    columns = ("class", "good", "anomalous", "score from", "mask from", "false positives", "recall", "F1")
    shown = make_table(columns, left=("class",), title=f"thresholds by {table.policy}")
    for name, found in table.classes.items():
        rates = (found.false_positive_rate, found.recall, found.f1)
        shown.add_row(
            escape(name),
            str(found.good),
            str(found.anomalous),
            f"{found.score:.4f}",
            f"{found.mask:.4f}",
            *("" if rate is None else f"{rate:.3f}" for rate in rates),
        )
    console.print(shown)
