"""`alfa calibrate`: thresholds by class from the scores of finished runs, as a file that jobs name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timezone

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.evaluation import calibrate_class, check_policy, merge_scores, read_scores
from pipeline.scoring import ThresholdError
from pipeline.storage import Store, open_store, paths
from schemas.job import JobConfig, Storage, parse_job, read_job_yaml
from schemas.thresholds import ThresholdTable

logger = logging.getLogger(__name__)

_FEW = 50
"""Below so many good images a rate of some per cent is a guess."""


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
    """Writes the thresholds of every class of the runs to `table` (a path or URI). Returns the exit code.

    Raises ThresholdError where runs were not scored alike, or their images do not suffice.
    """
    check_policy(policy)
    jobs = [_read_job(output, run_id) for run_id in run_ids]
    runs = [read_scores(output, run_id, all_good=all_good) for run_id in run_ids]
    for run_id, job, run in zip(run_ids, jobs, runs, strict=True):
        if (job.scoring_facts(), run.weights_sha256) != (jobs[0].scoring_facts(), runs[0].weights_sha256):
            raise ThresholdError(
                f"run {run_id} was scored with another model, method or references than {run_ids[0]}; thresholds hold "
                f"for one of them alone, so calibrate them one by one"
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
    console.print(f"written to {escape(store.uri(name))}; name it in a job:", highlight=False, soft_wrap=True)
    console.print(escape(f"  threshold: {{policy: labels, table: {store.uri(name)}}}"), highlight=False, soft_wrap=True)
    for name, found in classes.items():
        if policy != "f1_max" and found.good < _FEW:
            logger.warning("class %s: a false-positive rate set by %d good images is a guess", name, found.good)
    return 0


def _read_job(output: Store, run_id: str) -> JobConfig:
    try:
        return parse_job(read_job_yaml(output.read(paths.run_key(run_id, "job.yaml")).decode()))
    except FileNotFoundError:
        where = output.uri("")
        raise ThresholdError(f"{where} has no run {run_id}; `alfa status {where}` shows which there are") from None


def _print(table: ThresholdTable, console: Console) -> None:
    shown = Table(title=f"thresholds by {table.policy}", title_justify="left")
    shown.add_column("class")
    for column in ("good", "anomalous", "score from", "mask from", "false positives", "recall", "F1"):
        shown.add_column(column, justify="right")
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
