"""`alfa evaluate`: measures scores against ground truth, of a labelled data set or of a finished run."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jobs.compare import BASE, describe_base, expand
from jobs.console import make_table, print_line
from jobs.planning import RowsByClass, find_references, name_run, obtain_ensembles
from pipeline.alfa import locate_weights
from pipeline.evaluation import (
    HEADERS,
    PUBLISHED,
    TITLES,
    Benchmark,
    Block,
    Evaluation,
    LabelledImage,
    Picture,
    Score,
    Scored,
    Variant,
    average_draws,
    compose,
    draw_night,
    facts,
    first_draws,
    group_variants,
    labelled_images,
    measure,
    metric_cells,
    published_cells,
    read_run,
    score_variants,
    to_html,
    to_markdown,
)
from pipeline.images import ImageSource, decode_mask, list_images, open_dataset
from pipeline.scoring import CANDIDATES_PER_PEER, LowestIds, Neighbours, write_manifest
from pipeline.storage import Store, open_store, paths
from schemas.job import EMBEDDED_NOTE, JobConfig, JobError, Prompts, parse_job, read_job_yaml
from schemas.prompts import RunPrompts
from schemas.tables import EVALUATED_IMAGES, EVALUATION, SCHEMA_VERSION
from schemas.text import one_line

logger = logging.getLogger(__name__)

PRESETS: dict[Benchmark, dict[str, Any]] = {
    benchmark: {
        "dataset": {"layout": benchmark},
        "output": {"uri": f"out/{benchmark}"},
        "model": {"name": "ViT-B-16-plus-240", "pretrained": "laion400m_e32", "image_size": 240},
    }
    for benchmark in PUBLISHED
}
"""The papers' settings by benchmark: with --preset, a job needs nothing but dataset.images."""

_THREADS = max(4, 2 * (os.cpu_count() or 1))
_LOG_EVERY_S = 30.0


@dataclass(frozen=True)
class Comparisons:
    """The variants that a job is compared with, see jobs.compare.expand.

    anomaly_rate: draw the peers `draws` times, each time from a simulated night with this share of anomalous images.
    None: choose them once from all labelled images, as a night would.
    """

    keys: Sequence[str] = ()
    shots: Sequence[int] = ()
    peers: Sequence[int] = ()
    anomaly_rate: float | None = None
    draws: int = 20


def run_evaluate(job: JobConfig, compared: Comparisons, benchmark: Benchmark | None, console: Console) -> int:
    """Scores the labelled images of a job in every configuration; prints and stores the metrics. Returns the exit code.

    The code is 0, or 1 if too many images have no score (engine.max_error_rate). Everything runs in this process,
    without Ray. benchmark: shows its published results beside the measured ones; None: with comparisons, the benchmark
    whose layout the images have. Raises JobError and the pipeline's errors.
    """
    jobs = expand(job, compared.keys, compared.shots, compared.peers)
    output = open_store(job.output.uri, job.storage)
    source = open_dataset(job.dataset, job.storage, output)
    logger.info("layout %s at %s", source.layout, source.store.uri(""))
    most = max((one.peers.images for one in jobs.values() if one.peers is not None), default=1)
    choice = LowestIds(CANDIDATES_PER_PEER * most)
    with tempfile.TemporaryDirectory(prefix="alfa-") as scratch:
        images = labelled_images(write_manifest(choice.watch(list_images(source)), Path(scratch)))
    run_id, variants = _plan(jobs, images, choice.rows, source, output)
    draws = None
    if (rate := compared.anomaly_rate) is not None:
        nights = [draw_night(images, rate, number) for number in range(compared.draws)]
        drawn = {variant.name: _draw(variant, nights) for variant in variants}
        draws = {name: [item.name for item in items] for name, items in drawn.items()}
        variants = [item for items in drawn.values() for item in items]
    good = sum(image.is_good for image in images)
    logger.info("%d good and %d anomalous images; configurations: %s", good, len(images) - good, ", ".join(jobs))
    scored = _score(images, variants, source.store, console)
    if len(jobs) > 1 and benchmark is None:
        benchmark = next((known for known in PUBLISHED if known == source.layout), None)
    base = describe_base(job, compared.keys, compared.shots, compared.peers)
    return _finish(run_id, jobs, base, benchmark, scored, output, console, draws)


def _draw(variant: Variant, nights: Sequence[RowsByClass]) -> list[Variant]:
    """Returns one copy of the variant per night, with peers from that night; a variant without peers as it is."""
    if variant.job.peers is None:
        return [variant]
    return [
        replace(
            variant,
            name=f"{variant.name}, draw {number}",
            neighbours={known: replace(item, peers=night[known]) for known, item in variant.neighbours.items()},
        )
        for number, night in enumerate(nights)
    ]


def _score(images: Sequence[LabelledImage], variants: Sequence[Variant], source: Store, console: Console) -> Scored:
    """Scores the variants, and shows the progress as a bar on a terminal or as lines in a log."""
    total = len(images) * len(group_variants(variants))
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("scoring", total=total)
        said = started = time.monotonic()
        done = 0

        def advance(count: int) -> None:
            nonlocal said, done
            done += count
            progress.advance(task, count)
            if not console.is_terminal and time.monotonic() - said >= _LOG_EVERY_S:
                said = time.monotonic()
                logger.info("%d of %d images scored, %.1f images/s", done, total, done / (said - started))

        return score_variants(images, variants, source, _THREADS, advance)


def run_evaluate_run(
    output_uri: str, run_id: str, overrides: Sequence[str], console: Console, *, endpoint: str | None = None
) -> int:
    """Measures a finished run in an output against the labels of its manifest. Returns the exit code.

    overrides: key=value for keys of the run's job. endpoint: URL of the S3 that holds the output. Raises what
    run_evaluate raises.
    """
    job = _read_run_job(output_uri, run_id, overrides, endpoint)
    output = open_store(job.output.uri, job.storage)
    return _finish(run_id, {BASE: job}, "", None, read_run(output, run_id, BASE), output, console)


def _read_run_job(output_uri: str, run_id: str, overrides: Sequence[str], endpoint: str | None) -> JobConfig:
    """Reads the job of a finished run, with the output's present address. Raises JobError where the run is missing."""
    here = {"output.uri": output_uri, "storage.endpoint_url": endpoint}
    storage = parse_job({"dataset": {"images": "unread"}}, overrides, here).storage
    output = open_store(output_uri, storage)
    try:
        text = output.read(paths.run_key(run_id, "job.yaml")).decode()
    except FileNotFoundError:
        raise JobError(
            f"there is no run {run_id} at {output.uri('')}; alfa status {output_uri} lists the runs"
        ) from None
    return parse_job(read_job_yaml(text), overrides, here)


def _plan(
    jobs: Mapping[str, JobConfig],
    images: Sequence[LabelledImage],
    peers: RowsByClass,
    source: ImageSource,
    output: Store,
) -> tuple[str, list[Variant]]:
    """Prepares the variants: weights, prompts, references and peers. Returns the id of the run, and the variants.

    Several variants together get a run id of their own. peers: by class, the rows of images that may serve as peers.
    """
    classes = sorted({image.class_name for image in images})
    weights = {job.model: locate_weights(job.model) for job in jobs.values()}
    prompts: dict[tuple[Prompts, str], RunPrompts] = {}
    variants, run_ids = [], []
    for name, job in jobs.items():
        key = job.prompts, job.model.name
        if key not in prompts:
            prompts[key], _ = obtain_ensembles(job, classes, output)
        references = find_references(job, source, classes)
        ensembles = {item.class_name: item for item in prompts[key].ensembles}
        neighbours = {
            known: Neighbours(references.get(known, ()), () if job.peers is None else peers.get(known, ()))
            for known in classes
        }
        variants.append(Variant(name, job, ensembles, neighbours))
        run_ids.append(name_run(job, weights[job.model], prompts[key], references).run_id)
    if len(run_ids) == 1:
        return run_ids[0], variants
    together = hashlib.sha256("\n".join(run_ids).encode()).hexdigest()[:12]
    return f"{jobs[BASE].run_date}-{together}", variants


def _finish(
    run_id: str,
    jobs: Mapping[str, JobConfig],
    base: str,
    benchmark: Benchmark | None,
    scored: Scored,
    output: Store,
    console: Console,
    draws: Mapping[str, Sequence[str]] | None = None,
) -> int:
    """Measures the scores, stores and prints the metrics. Returns the exit code. draws: see average_draws."""
    job = jobs[BASE]
    # Masks and photos are read by address, because they need not lie below dataset.images.
    read = open_store(job.dataset.images, job.storage).read_uri
    cut = job.threshold.value if job.threshold.policy == "fixed" else None
    measured = measure(scored.images, scored.configurations, lambda uri: decode_mask(read(uri)), _THREADS, cut)
    if draws is not None:
        measured, scored = average_draws(measured, draws), first_draws(scored, draws)
    # A finished run can be measured on a machine that does not have its weights.
    is_embedded = job.model.is_embedded
    model = job.model.name if job.model.pretrained is None else f"{job.model.name}/{Path(job.model.pretrained).name}"
    evaluation = Evaluation(run_id, model, is_embedded, job.dataset.images, base, benchmark, scored, measured)
    if is_embedded:
        logger.info("%s is %s", model, EMBEDDED_NOTE)
    _store(evaluation, jobs, output, compose(evaluation, read, job.dataset.max_pixels))
    _print(evaluation, output, console)
    errors = sum(score is None for score in scored.configurations[0].scores)
    if errors > job.engine.max_error_rate * len(scored.images):
        logger.error("%d of %d images have no score, more than max_error_rate allows", errors, len(scored.images))
        return 1
    return 0


def _store(evaluation: Evaluation, jobs: Mapping[str, JobConfig], output: Store, blocks: Sequence[Block]) -> None:
    """Writes the results into the output: pictures and tables first, the documents that name them last."""

    def write(name: str, data: bytes) -> None:
        output.write(paths.evaluation_key(evaluation.run_id, name), data)

    for block in blocks:
        if isinstance(block, Picture):
            write(block.name, block.data)
    images = [
        {
            "configuration": configuration.name,
            "class_name": image.class_name,
            "image_key": image.key,
            "image_uri": image.uri,
            "label": image.label,
            **({} if score is None else _numbers(score)),
        }
        for configuration in evaluation.scored.configurations
        for image, score in zip(evaluation.scored.images, configuration.scores, strict=True)
    ]
    write("images.parquet", _parquet(images, EVALUATED_IMAGES))
    write("metrics.parquet", _parquet(evaluation.measured.rows, EVALUATION))
    document = {
        "schema_version": SCHEMA_VERSION,
        "run_id": evaluation.run_id,
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": evaluation.model,
        "embedded_model": evaluation.is_embedded,
        "jobs": {name: job.model_dump(mode="json") for name, job in jobs.items()},
        "rows": [{name: row.get(name) for name in EVALUATION.names} for row in evaluation.measured.rows],
        "published": [asdict(row) for row in PUBLISHED[evaluation.benchmark]] if evaluation.benchmark else [],
    }
    write("metrics.json", json.dumps(document, indent=2, ensure_ascii=False).encode())
    write("evaluation.html", to_html(blocks))
    write("metrics.md", to_markdown(blocks))


def _numbers(score: Score) -> dict[str, float]:
    return {name: getattr(score, name) for name in ("score", "score_global", "score_local")}


def _parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def _print(evaluation: Evaluation, output: Store, console: Console) -> None:
    """Prints the metrics of each class, or the means of several configurations, and published results below."""
    several = len(evaluation.scored.configurations) > 1
    first = "configuration" if several else "class"
    columns = (first, "good", "anomalous", *HEADERS)
    table = make_table(columns, left=(first,), title=f"evaluation of run {evaluation.run_id}, percent")
    for row in evaluation.rows("mean" if several else "class"):
        name = row["configuration"] if several else row["class_name"]
        table.add_row(escape(one_line(name)), str(row["good"]), str(row["anomalous"]), *metric_cells(row))
    if not several:
        table.add_section()
        mean = evaluation.rows("mean")[0]
        table.add_row("mean", str(mean["good"]), str(mean["anomalous"]), *metric_cells(mean))
    if evaluation.benchmark is not None:
        table.add_section()
        for item in PUBLISHED[evaluation.benchmark]:
            table.add_row(f"{item.method} ({item.note})", "", "", *published_cells(item))
    console.print(table)
    if several:
        print_line(console, f"{BASE}: {evaluation.base}")
    if evaluation.benchmark is not None:
        print_line(console, f"published: means over {TITLES[evaluation.benchmark]}, zero-shot unless noted otherwise")
    for line in facts(evaluation):
        print_line(console, line)
    for name in ("metrics.md", "evaluation.html", "metrics.parquet"):
        print_line(console, output.uri(paths.evaluation_key(evaluation.run_id, name)))
