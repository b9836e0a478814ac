"""`alfa score`: scores and publishes a night, from the listing of its images to its commit."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from jobs import logs
from jobs.console import make_table, print_line
from jobs.progress import RunProgress
from jobs.report import report_night
from pipeline.alfa import Weights, locate_weights, text_fits
from pipeline.engine import ScoringPool, connect, obtain_prompts
from pipeline.images import ImageSource, list_images, list_references, open_dataset
from pipeline.lake import open_catalog, publish_night, publish_snapshot, read_commit
from pipeline.prompts import compose_ensemble, find, obtain, record_prompts
from pipeline.scoring import (
    HASHED,
    Manifest,
    ThresholdError,
    Thresholds,
    choose_references,
    cut_shards,
    describe_choice,
    fixed_thresholds,
    identify_shards,
    parse_table,
    quantile_thresholds,
    reference_thresholds,
    require_two,
    select_thresholds,
    write_manifest,
)
from pipeline.storage import Run, Store, leases, open_store, paths, read_shards
from schemas.job import EMBEDDED_NOTE, JobConfig, dump_job_yaml
from schemas.prompts import PromptSet, RunPrompts, Usage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is known of a night before its first image is scored."""

    run: Run
    weights: Weights
    source: ImageSource
    manifest: Manifest
    prompts: RunPrompts
    usage: Usage
    """What this job has spent on prompts; sets that were stored already cost nothing."""
    references: Mapping[str, Sequence[Mapping[str, Any]]]
    """By class, the manifest rows of the known-good images that it is compared with (few-shot)."""
    thresholds: Mapping[str, Thresholds]
    """By class, from the calibrated table; empty unless threshold.policy is labels."""
    table: bytes
    """The calibrated table, as its file holds it."""


def run_score(job: JobConfig, console: Console) -> int:
    """Scores and publishes a night. Returns the exit code: 0, or 1 past the error budget.

    Run again, it resumes, or finds the night published. Raises the pipeline's errors. Where it is interrupted or fails,
    the shards that were finished are kept.
    """
    started = time.monotonic()
    output = open_store(job.output.uri, job.storage)
    source = open_dataset(job.dataset, job.storage, output)
    if job.lake.format == "iceberg":
        open_catalog(job)  # what cannot be published need not be scored
    with tempfile.TemporaryDirectory(prefix="alfa-") as scratch:
        plan = plan_run(job, source, Path(scratch), output)
        logs.bind(run_id=plan.run.run_id)
        commit, stats = _run_or_wait(plan, output, console, started)
        if job.lake.format == "iceberg":
            publish_snapshot(job, output, leases.new_owner())
    report = report_night(output, commit, anew=stats.get("state") == "done")
    totals = _totals(commit)
    found, errors = sum(totals["anomalies"].values()), sum(totals["errors"].values())
    logger.info(
        "night %s is published: %d images, %d anomalous, %d errors", job.run_date, commit["rows"], found, errors
    )
    print_summary(plan, commit, stats, report, output, console)
    return _exit_code(commit, job.engine.max_error_rate)


def plan_run(job: JobConfig, source: ImageSource, scratch: Path, output: Store) -> Plan:
    """Lists the images, obtains the prompts, and works out which run this is."""
    logger.info("layout %s at %s", source.layout, source.store.uri(""))
    manifest = write_manifest(list_images(source), scratch)
    logger.info("%d images of %d classes: %s", manifest.images, len(manifest.classes), _shorten(manifest.classes))
    weights = locate_weights(job.model)
    if weights.is_embedded:
        logger.info("%s is %s", weights.label, EMBEDDED_NOTE)
    table = _read_table(job)
    place, classes = str(job.threshold.table), list(manifest.classes)
    calibrated = parse_table(table, place) if table else None
    thresholds = select_thresholds(calibrated, place, job, weights.sha256, classes) if calibrated else {}
    references = find_references(job, source, classes)
    prompts, usage = obtain_ensembles(job, classes, output)
    run = name_run(job, weights, prompts, references, table)
    return Plan(run, weights, source, manifest, prompts, usage, references, thresholds, table)


def find_references(job: JobConfig, source: ImageSource, classes: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Chooses the reference images of each class, as manifest rows; classes without any are left out.

    Empty where the job is zero-shot. Raises DatasetError where no class has any, ThresholdError where
    threshold.policy reference needs more of them.
    """
    if job.references is None:
        return {}
    rows = list_references(job.references, job.dataset, source, job.storage)
    chosen = choose_references(rows, job.references.shots, job.references.seed)
    for line in describe_choice(chosen, classes, job.references.shots):
        logger.warning("%s", line)
    if job.threshold.policy == "reference":
        for name in classes:
            require_two(name, len(chosen.get(name, ())))
    return {name: chosen[name] for name in classes if name in chosen}


def _read_table(job: JobConfig) -> bytes:
    """Reads the file of calibrated thresholds that the job names; empty where it names none."""
    if job.threshold.policy != "labels" or job.threshold.table is None:
        return b""
    folder, _, name = job.threshold.table.rpartition("/")
    try:
        return open_store(folder or ".", job.storage).read(name)
    except FileNotFoundError:
        raise ThresholdError(
            f"threshold.table {job.threshold.table} is missing; write it with alfa calibrate, or take another policy"
        ) from None


def obtain_ensembles(job: JobConfig, classes: Sequence[str], output: Store) -> tuple[RunPrompts, Usage]:
    """Obtains the prompts of the classes. Returns them, and what was spent now on an LLM that describes classes."""
    sets, usage = _prompt_sets(job, classes, output)
    for prompt_set in sets:
        logger.info("prompts of %s: %s", prompt_set.class_name, _origin(prompt_set))
    fits = text_fits(job.model)
    return record_prompts(sets, [compose_ensemble(prompt_set, fits) for prompt_set in sets]), usage


def name_run(
    job: JobConfig,
    weights: Weights,
    prompts: RunPrompts,
    references: Mapping[str, Sequence[Mapping[str, Any]]],
    table: bytes = b"",
) -> Run:
    """Names the run of a job; its id hashes all that determines its rows.

    references: manifest rows of the reference images, by class. table: the file of calibrated thresholds.
    """
    prompts_fingerprint = "\n".join(f"{item.class_name}\0{item.fingerprint}" for item in prompts.ensembles)
    image_ids = [image["image_id"] for _, images in sorted(references.items()) for image in images]
    digest = hashlib.sha256(table).hexdigest()
    run_id = f"{job.run_date}-{job.result_fingerprint(weights.sha256, prompts_fingerprint, image_ids, digest)}"
    return Run(run_id, job, weights.label, weights.sha256)


def _prompt_sets(job: JobConfig, classes: Sequence[str], output: Store) -> tuple[list[PromptSet], Usage]:
    """Reads stored and bundled sets here; Ray and its prompt actor are needed only where an LLM is to be asked."""
    stored = {name: find(output, name, job.prompts) for name in classes}
    missing = [name for name, prompt_set in stored.items() if prompt_set is None]
    made: dict[str, PromptSet] = {}
    if not job.prompts.asks_llm:
        made = {name: obtain(output, name, job.prompts, owner="") for name in missing}
    elif missing:
        with connect(job):
            made = dict(zip(missing, obtain_prompts(job, missing, leases.new_owner()), strict=True))
    sets = [prompt_set for name in classes if (prompt_set := stored[name] or made.get(name))]
    return sets, _sum_usage([item.usage for item in made.values() if item.source == "llm"])


def _sum_usage(items: Sequence[Usage]) -> Usage:
    costs = [item.cost_usd for item in items]
    return Usage(
        calls=sum(item.calls for item in items),
        prompt_tokens=sum(item.prompt_tokens for item in items),
        completion_tokens=sum(item.completion_tokens for item in items),
        cost_usd=None if not costs or None in costs else sum(cost for cost in costs if cost is not None),
    )


def _run_or_wait(plan: Plan, output: Store, console: Console, started: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Executes the run. Returns its commit and its stats.

    Where another driver works on the run, this one waits until that has published it, or has died, and then goes on
    from there.
    """
    run, lease_s, owner = plan.run, plan.run.job.engine.lease_s, leases.new_owner()
    published: dict[str, Any] = {}

    def is_published() -> bool:
        commit = read_commit(output, run.job.run_date)
        if commit and (commit["run_id"], commit["manifest"]) == (run.run_id, plan.manifest.digest):
            published.update(commit)
        return bool(published)

    def say(holder: str) -> None:
        logger.warning(
            "%s works on run %s; waiting until it is done, or has been silent for %g s", holder, run.run_id, lease_s
        )

    lease = leases.acquire(output, paths.driver_lease(run.run_id), owner, lease_s, is_published, say)
    if lease is None:
        logger.info("run %s is already published; nothing to do", run.run_id)
        return published, {"scored_by_this_job": 0, "usage": plan.usage.model_dump()}
    with lease.held(lease_s):
        return _execute(plan, output, console, lease, started)


def _execute(
    plan: Plan, output: Store, console: Console, lease: leases.Lease, started: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    run, job, manifest = plan.run, plan.run.job, plan.manifest
    output.write(paths.run_key(run.run_id, "job.yaml"), dump_job_yaml(job).encode())
    output.write(paths.run_key(run.run_id, "prompts.json"), plan.prompts.model_dump_json().encode())
    if plan.table:
        output.write(paths.run_key(run.run_id, "thresholds.json"), plan.table)
    output.create(paths.manifest_key(run.run_id, manifest.digest), manifest.path.read_bytes())
    size = job.engine.shard_size
    shard_ids = list(identify_shards(manifest.batches(HASHED), size))
    finished = paths.finished_shards(output, run.shards) & set(shard_ids)
    if finished:
        logger.info("run %s: %d of %d shards are finished already", run.run_id, len(finished), len(shard_ids))
    waiting = (shard for shard in cut_shards(manifest.batches(), size) if shard.shard_id not in finished)
    left = max(0, manifest.images - len(finished) * size)
    facts = {
        "run_id": run.run_id,
        "run_date": str(job.run_date),
        "source": plan.source.store.uri(""),
        "images": manifest.images,
        "shards": len(shard_ids),
        "model": run.model,
        "embedded_model": plan.weights.is_embedded,
        "prompt_sources": Counter(item.source for item in plan.prompts.ensembles),
        "usage": plan.usage.model_dump(),
        "versions": versions(),
    }
    with connect(job):
        pool = ScoringPool(run, plan.weights.sha256, plan.source.store.uri(""))
        try:
            with RunProgress(facts, output, console, left, pool.plan.count, started) as progress:
                if len(finished) < len(shard_ids):
                    pool.embed(plan.prompts.ensembles, plan.references)
                    progress.start_scoring()
                    for stats in pool.score(waiting):
                        progress.add(stats)
                        lease.check()
                folder = _mask_all(plan, pool, shard_ids, output, lease)
                lease.check()
                commit = publish_night(run, manifest.digest, folder, shard_ids, output, lease.owner)
                return commit, progress.write("done", **_totals(commit))
        finally:
            pool.close()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that this driver runs with."""
    found = {"python": platform.python_version()}
    for name in ("alfa-pipeline", "open_clip_torch", "ray", "torch"):
        # Code that was uploaded to a cluster is not installed there.
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _mask_all(plan: Plan, pool: ScoringPool, shard_ids: Sequence[str], output: Store, lease: leases.Lease) -> str:
    """Returns the folder of the shards to publish. Where thresholds follow from the scores, masks are made now."""
    run = plan.run
    if fixed_thresholds(run.job) is not None:
        return run.shards
    thresholds = _thresholds(plan, shard_ids, output)
    digest = _digest(thresholds)
    folder = paths.masked_shards(run.run_id, digest)
    finished = paths.finished_shards(output, folder)
    for _ in pool.mask((shard for shard in shard_ids if shard not in finished), digest, thresholds):
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


def _totals(commit: Mapping[str, Any]) -> dict[str, Any]:
    errors: Counter[str] = Counter()
    for entry in commit["files"]:
        errors.update(entry["errors"])
    anomalies = {entry["class_name"]: entry["anomalies"] for entry in commit["files"]}
    return {"rows": commit["rows"], "errors": dict(errors), "anomalies": anomalies}


def _exit_code(commit: Mapping[str, Any], max_error_rate: float) -> int:
    errors = sum(_totals(commit)["errors"].values())
    if commit["rows"] and errors / commit["rows"] > max_error_rate:
        logger.error("%d of %d images are errors, more than max_error_rate %g", errors, commit["rows"], max_error_rate)
        return 1
    return 0


def print_summary(
    plan: Plan,
    commit: Mapping[str, Any],
    stats: Mapping[str, Any],
    report: str | None,
    output: Store,
    console: Console,
) -> None:
    """Prints what a person wants to know at the end: how many images, what failed, what it cost, where it all is."""
    run, totals = plan.run, _totals(commit)
    columns = ("class", "images", "anomalous", "errors", "prompts")
    table = make_table(columns, left=("class", "prompts"), title=f"run {run.run_id}")
    sources = {item.class_name: item.source for item in plan.prompts.ensembles}
    for entry in commit["files"]:
        errors = sum(entry["errors"].values())
        name = entry["class_name"]
        table.add_row(escape(name), str(entry["rows"]), str(entry["anomalies"]), str(errors), sources.get(name, ""))
    console.print(table)
    errors = totals["errors"]
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(errors.items())) or "none"
    usage = stats["usage"]
    cost = "unknown" if usage["cost_usd"] is None else f"{usage['cost_usd']:.4f} USD"
    spent = f"{usage['calls']} calls"
    if usage["calls"]:
        spent += f", {usage['prompt_tokens'] + usage['completion_tokens']} tokens, cost {cost}"
    lines = [
        ("images", f"{commit['rows']}, {commit['rows'] - sum(errors.values())} ok; errors: {listed}"),
        ("LLM", spent),
        *_describe_speed(stats),
        ("table", output.uri(paths.TABLE)),
        ("masks", output.uri(f"masks/run_date={run.job.run_date}")),
        ("run", output.uri(paths.run_key(run.run_id, "").rstrip("/"))),
        ("commit", output.uri(paths.commit_key(run.job.run_date))),
        ("report", report or "could not be written; the log says why"),
    ]
    if plan.weights.is_embedded:
        lines.insert(0, ("model", f"{run.model}, {EMBEDDED_NOTE}"))
    for name, text in lines:
        print_line(console, f"{name:>7}  {text}")


def _describe_speed(stats: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not stats["scored_by_this_job"]:
        return [("rate", "nothing was left to score")]
    rate, scoring_s = stats["scoring_images_per_second"], stats["scoring_seconds"]
    return [
        ("rate", f"{rate:g} images/s, over {scoring_s:g} s of scoring"),
        ("time", f"{stats['total_seconds']:g} s in total, with listing, start of Ray and models, and publishing"),
    ]


def _origin(prompt_set: PromptSet) -> str:
    if prompt_set.source == "llm":
        return f"by {prompt_set.model}"
    return "bundled" if prompt_set.source == "bundled" else "base ensemble only; no LLM has described this class"


def _shorten(classes: Mapping[str, int], most: int = 8) -> str:
    shown = ", ".join(f"{name} {count}" for name, count in list(classes.items())[:most])
    return shown + (f" and {len(classes) - most} more" if len(classes) > most else "")
