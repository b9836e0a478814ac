"""`alfa score`: runs one night from listing to commit."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from jobs import logs
from jobs.console import make_table, print_line
from jobs.planning import Plan, open_source, plan_run
from jobs.progress import RunProgress
from jobs.report import report_night
from pipeline.engine import ScoringPool, connect
from pipeline.images import describe_left_out
from pipeline.lake import (
    open_catalog,
    publish_night,
    publish_snapshot,
    read_commit,
)
from pipeline.scoring import (
    SAMPLE_COLUMNS,
    Neighbours,
    Thresholds,
    choose_samples,
    cut_shards,
    fixed_thresholds,
    identify_shards,
    quantile_thresholds,
    read_spans,
    reference_thresholds,
    write_samples,
)
from pipeline.storage import Store, leases, open_store, paths, read_shards
from schemas.job import EMBEDDED_NOTE, JobConfig, dump_job_yaml
from schemas.records import ActorCounts, Commit, RunStats, SelectionCounts
from schemas.text import one_line

logger = logging.getLogger(__name__)


def run_score(job: JobConfig, console: Console) -> int:
    """Scores and publishes a night. Returns the exit code: 0, or 1 if too many rows are errors (max_error_rate).

    Finished shards are kept if it fails or is interrupted. Run again, it resumes, or finds the night published. Raises
    the pipeline's errors.
    """
    started = time.monotonic()
    output = open_store(job.output.uri, job.storage)
    source = open_source(job, output)
    if job.lake.format == "iceberg":
        open_catalog(job)  # fail before the night, not after it
    with tempfile.TemporaryDirectory(prefix="alfa-") as scratch:
        plan = plan_run(job, source, Path(scratch), output)
        logs.bind(run_id=plan.run.run_id)
        commit, stats = _run_or_wait(plan, output, console, started)
        if job.lake.format == "iceberg":
            publish_snapshot(job, output, leases.new_owner())
    report = report_night(output, commit, anew=stats is not None)
    _warn_of_fences(commit)
    logger.info(
        "night %s is published: %d images, %d anomalous, %d errors",
        job.run_date,
        commit.rows,
        sum(commit.anomalies.values()),
        commit.failed,
    )
    print_summary(plan, commit, stats, report, output, console)
    return _exit_code(commit, job.engine.max_error_rate)


def _run_or_wait(plan: Plan, output: Store, console: Console, started: float) -> tuple[Commit, RunStats | None]:
    """Executes the run. Returns its commit, and its stats; None instead of stats if the run was published already.

    If another driver works on the run, this one waits until the other has published it. If the other dies, this one
    goes on with its run.
    """
    run, lease_s, owner = plan.run, plan.run.job.engine.lease_s, leases.new_owner()
    published: list[Commit] = []

    def is_published() -> bool:
        commit = read_commit(output, run.job.run_date)
        if commit and (commit.run_id, commit.manifest) == (run.run_id, plan.manifest.digest):
            published.append(commit)
        return bool(published)

    def say(holder: str) -> None:
        logger.warning(
            "%s works on run %s; waiting until it has finished, or has been silent for %g s",
            holder,
            run.run_id,
            lease_s,
        )

    lease = leases.acquire(output, paths.driver_lease(run.run_id), owner, lease_s, is_published, say)
    if lease is None:
        logger.info("run %s is already published; nothing to do", run.run_id)
        return published[-1], None
    with lease.held(lease_s):
        return _execute(plan, output, console, lease, started)


def _execute(
    plan: Plan, output: Store, console: Console, lease: leases.Lease, started: float
) -> tuple[Commit, RunStats | None]:
    run, job, manifest = plan.run, plan.run.job, plan.manifest
    output.write(paths.run_key(run.run_id, "job.yaml"), dump_job_yaml(job).encode())
    output.write(paths.run_key(run.run_id, "prompts.json"), plan.prompts.model_dump_json().encode())
    if plan.table:
        output.write(paths.run_key(run.run_id, "thresholds.json"), plan.table)
    output.create(paths.manifest_key(run.run_id, manifest.digest), manifest.path)
    if job.dataset.bit_depth is None:
        write_samples(run.run_id, choose_samples(manifest.batches(SAMPLE_COLUMNS)), plan.spans, output)
    sizes = identify_shards(manifest, job.engine.shard_size)
    shard_ids = list(sizes)
    finished = paths.finished_shards(output, run.shards) & set(shard_ids)
    if finished:
        logger.info("run %s: %d of %d shards are finished already", run.run_id, len(finished), len(shard_ids))
    waiting = (shard for shard in cut_shards(manifest, job.engine.shard_size) if shard.shard_id not in finished)
    left = sum(images for shard_id, images in sizes.items() if shard_id not in finished)
    facts = RunStats(
        run_id=run.run_id,
        run_date=job.run_date,
        source=plan.source.store.uri(""),
        state="running",
        updated_at=datetime.now(timezone.utc),
        images=manifest.images,
        shards=len(shard_ids),
        errors={},
        anomalies={},
        model=run.model,
        embedded_model=plan.weights.is_embedded,
        prompt_sources=Counter(item.source for item in plan.prompts.ensembles),
        usage=plan.usage,
        selection=None if plan.selection is None else SelectionCounts(**asdict(plan.selection)),
        left_out=dict(plan.left_out),
        versions=versions(),
    )
    if not shard_ids:
        with RunProgress(facts, output, console, 0, started) as progress:
            commit = publish_night(run, manifest.digest, run.shards, [], output, lease.owner)
            return commit, progress.write("done", commit=commit)
    with RunProgress(facts, output, console, left, started) as progress:
        with connect(job):
            pool = ScoringPool(run, plan.weights.sha256, plan.source.store.uri(""), len(shard_ids) - len(finished))
            try:
                if len(finished) < len(shard_ids):
                    pool.embed(plan.prompts.ensembles, _neighbours(plan))
                    progress.start_scoring()
                    for stats in pool.score(waiting):
                        progress.count_actors(ActorCounts(**asdict(pool.placed)))
                        progress.add(stats)
                        lease.check()
                folder = _mask_all(plan, pool, shard_ids, output, lease)
            finally:
                pool.close()
        lease.check()
        spans = read_spans(run.run_id, manifest.classes, output)
        commit = publish_night(run, manifest.digest, folder, shard_ids, output, lease.owner, plan.fingerprints, spans)
        return commit, progress.write("done", commit=commit)


def _neighbours(plan: Plan) -> dict[str, Neighbours]:
    """Returns, by class, the photos that its images are compared with."""
    return {
        name: Neighbours(plan.references.get(name, ()), plan.peers.get(name, ()), plan.earlier.get(name, ()))
        for name in plan.manifest.classes
    }


def _warn_of_fences(commit: Commit) -> None:
    for entry in commit.files:
        if entry.is_beyond_fence:
            logger.warning(
                "%d of %d images of %s lie beyond the fence of the class, which is only valid if fewer than a third "
                "are anomalous; look at the photos before you trust the verdicts of this class",
                entry.beyond,
                entry.compared,
                one_line(entry.class_name),
            )


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the main packages of this driver."""
    found = {"python": platform.python_version()}
    for name in ("alfa-pipeline", "open_clip_torch", "ray", "torch"):
        # alfa submit uploads code without installing it.
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _mask_all(plan: Plan, pool: ScoringPool, shard_ids: Sequence[str], output: Store, lease: leases.Lease) -> str:
    """Makes the masks now if the thresholds follow from the scores. Returns the folder of the shards to publish."""
    run = plan.run
    if fixed_thresholds(run.job) is not None:
        return run.shards
    thresholds = _thresholds(plan, shard_ids, output)
    digest = _digest(thresholds)
    folder = paths.masked_shards(run.run_id, digest)
    finished = paths.finished_shards(output, folder)
    for _ in pool.mask([shard for shard in shard_ids if shard not in finished], digest, thresholds):
        lease.check()
    return folder


def _thresholds(plan: Plan, shard_ids: Sequence[str], output: Store) -> Mapping[str, Thresholds]:
    run, options = plan.run, plan.run.job.threshold
    if options.policy == "labels":
        return plan.thresholds
    if options.policy == "reference":
        return reference_thresholds(run.run_id, list(plan.manifest.classes), options.reference_quantile, output)
    scores = read_shards(output, run.shards, shard_ids, ["class_name", "score", "map_peak"])
    return quantile_thresholds(scores, options.quantile)


def _digest(thresholds: Mapping[str, Thresholds]) -> str:
    text = repr(sorted((name, cut.score, cut.mask) for name, cut in thresholds.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _exit_code(commit: Commit, max_error_rate: float) -> int:
    if commit.rows and commit.failed / commit.rows > max_error_rate:
        logger.error(
            "%d of %d images are errors, more than engine.max_error_rate (%g) allows",
            commit.failed,
            commit.rows,
            max_error_rate,
        )
        return 1
    return 0


def print_summary(
    plan: Plan,
    commit: Commit,
    stats: RunStats | None,
    report: str | None,
    output: Store,
    console: Console,
) -> None:
    """Prints the summary of a night: counts by class, errors, cost, speed, and where the results are."""
    run = plan.run
    columns = ("class", "images", "anomalous", "errors", "prompts")
    table = make_table(columns, left=("class", "prompts"), title=f"run {run.run_id}")
    sources = {item.class_name: item.source for item in plan.prompts.ensembles}
    for entry in commit.files:
        counts = map(str, (entry.rows, entry.anomalies, entry.failed))
        table.add_row(escape(entry.class_name), *counts, sources.get(entry.class_name, ""))
    console.print(table)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(commit.errors.items())) or "none"
    usage = plan.usage
    cost = "unknown" if usage.cost_usd is None else f"{usage.cost_usd:.4f} USD"
    spent = f"{usage.calls} calls"
    if usage.calls:
        spent += f", {usage.prompt_tokens + usage.completion_tokens} tokens, cost {cost}"
    lines = [
        ("images", f"{commit.rows}, {commit.rows - commit.failed} ok; errors: {listed}"),
        *([("clipped", f"{stats.clipped} photos exceed the depth of their class")] if stats and stats.clipped else []),
        *([("skipped", f"by suffix: {describe_left_out(plan.left_out)}")] if plan.left_out else []),
        ("LLM", spent),
        *_describe_speed(stats),
        ("table", output.uri(paths.TABLE)),
        ("masks", output.uri(f"masks/run_date={run.job.run_date}")),
        ("run", output.uri(paths.run_key(run.run_id, "").rstrip("/"))),
        ("commit", output.uri(paths.commit_key(run.job.run_date))),
        ("report", report or "could not be written; the log says why"),
    ]
    if (selection := plan.selection) is not None:
        left_out = (
            f"{selection.listed} listed, {selection.scored} scored in other nights, {selection.given_up} given up"
        )
        lines.insert(0, ("new", f"{plan.manifest.images}; {left_out}"))
    if plan.weights.is_embedded:
        lines.insert(0, ("model", f"{run.model}, {EMBEDDED_NOTE}"))
    for name, text in lines:
        print_line(console, f"{name:>7}  {text}")


def _describe_speed(stats: RunStats | None) -> list[tuple[str, str]]:
    if stats is None or not stats.scored_by_this_job:
        return [("rate", "nothing was left to score")]
    return [
        ("rate", f"{stats.rate:g} images/s, over {stats.scoring_seconds:g} s of scoring"),
        ("time", f"{stats.total_seconds:g} s in total, including listing, the start of Ray and models, and publishing"),
    ]
