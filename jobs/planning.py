"""Plans a night before its first image is scored: its images, prompts, references, thresholds and run id."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.alfa import Weights, locate_weights, text_fits
from pipeline.engine import connect, obtain_prompts
from pipeline.images import ImageSource, describe_left_out, list_images, list_references, open_dataset
from pipeline.lake import (
    KnownPhotos,
    Selection,
    find_earlier,
    find_ledgers,
    published_nights,
    read_known,
)
from pipeline.prompts import compose_ensemble, find, find_or_make, obtain, record_prompts
from pipeline.scoring import (
    CANDIDATES_PER_PEER,
    LowestIds,
    Manifest,
    ThresholdError,
    Thresholds,
    choose_references,
    describe_choice,
    parse_table,
    require_two,
    select_thresholds,
    write_manifest,
)
from pipeline.storage import Run, Store, leases, open_store
from schemas.job import EMBEDDED_NOTE, JobConfig, Peers
from schemas.prompts import PromptEnsemble, PromptSet, RunPrompts, Usage

logger = logging.getLogger(__name__)


RowsByClass = Mapping[str, Sequence[Mapping[str, Any]]]
"""Rows of a manifest, by class name."""

_READERS = 16
"""Stored prompt sets that are read at once."""


@dataclass(frozen=True)
class Plan:
    """Everything that is decided about a night before its first image is scored."""

    run: Run
    weights: Weights
    source: ImageSource
    manifest: Manifest
    prompts: RunPrompts
    usage: Usage
    """What this job has spent on prompts; sets that were stored already cost nothing."""
    references: RowsByClass
    """Known-good images to compare with (few-shot)."""
    peers: RowsByClass
    """Photos of the night that may serve as peers, in the order in which they are tried."""
    earlier: RowsByClass
    """Photos of earlier nights that may serve as peers, for classes that have too few tonight."""
    thresholds: Mapping[str, Thresholds]
    """Thresholds by class from the calibrated table; empty unless threshold.policy is labels."""
    table: bytes
    """Content of the file of the calibrated table; empty unless threshold.policy is labels."""
    fingerprints: Mapping[str, str]
    """JobConfig.class_fingerprint of each class."""
    selection: Selection | None
    """Counts of the images left out; None unless dataset.select is new."""
    spans: Mapping[str, tuple[float, float]]
    """CommitFile.span of each class in its latest night; empty unless dataset.select is new."""
    left_out: Mapping[str, int]
    """Number of objects that are no images, by suffix."""


def open_source(job: JobConfig, output: Store) -> ImageSource:
    """Opens the images of a job. Raises DatasetError where there are none.

    With `dataset.select: new` there may be none if the output has published nights: on a Sunday, the folder of the day
    may be missing.
    """
    may_be_empty = job.dataset.select == "new" and bool(published_nights(output))
    return open_dataset(job.dataset, job.storage, output, may_be_empty=may_be_empty)


def plan_run(job: JobConfig, source: ImageSource, scratch: Path, output: Store) -> Plan:
    """Plans a night: lists and selects the images, obtains prompts, references and thresholds, and names the run.

    scratch: local folder for the manifest. Raises the pipeline's errors.
    """
    logger.info("layout %s at %s", source.layout, source.store.uri(""))
    weights = locate_weights(job.model)
    if weights.is_embedded:
        logger.info("%s is %s", weights.label, EMBEDDED_NOTE)
    chosen = choose_all_references(job, source)
    left_out: Counter[str] = Counter()
    choice = LowestIds(CANDIDATES_PER_PEER * job.peers.images) if job.peers is not None else None
    manifest, selection, spans = list_night(job, weights, source, chosen, scratch, output, left_out, choice)
    classes = list(manifest.classes)
    table, thresholds = read_thresholds(job, weights, classes)
    references = select_references(job, chosen, classes)
    prompts, usage = obtain_ensembles(job, classes, output)
    run = name_run(job, weights, prompts, references, table)
    fingerprints = class_fingerprints(job, weights, prompts.ensembles, references)
    peers = choice.rows if choice is not None else {}
    earlier = find_earlier_peers(job, manifest.classes, peers, output)
    if job.peers is not None:
        _log_few_images(
            job.peers, {name: count + len(earlier.get(name, ())) for name, count in manifest.classes.items()}
        )
    return Plan(
        run,
        weights,
        source,
        manifest,
        prompts,
        usage,
        references,
        peers,
        earlier,
        thresholds,
        table,
        fingerprints,
        selection,
        spans,
        left_out,
    )


def list_night(
    job: JobConfig,
    weights: Weights,
    source: ImageSource,
    references: RowsByClass,
    scratch: Path,
    output: Store,
    left_out: Counter[str],
    choice: LowestIds | None = None,
) -> tuple[Manifest, Selection | None, Mapping[str, tuple[float, float]]]:
    """Lists the images to score. Returns their manifest, the counts of what `dataset.select: new` left out, and the
    spans of the classes in their latest nights (KnownPhotos.spans).

    Writes nothing to the output. left_out: counts objects that are no images, by suffix. choice: watches the images
    to score.
    """
    listed, selection = list_images(source, left_out), None
    spans: Mapping[str, tuple[float, float]] = {}
    if job.dataset.select == "new":
        selection = Selection()
        known = read_known_photos(job, weights, references, scratch, output)
        listed, spans = known.leave_out(listed, selection), known.spans
    manifest = write_manifest(listed if choice is None else choice.watch(listed), scratch)
    if selection is not None:
        _log_selection(selection, manifest.images, job.dataset.error_nights)
    if left_out:
        logger.info("left out by suffix: %s; dataset.suffixes changes that", describe_left_out(left_out))
    logger.info("%d images of %d classes: %s", manifest.images, len(manifest.classes), _shorten(manifest.classes))
    return manifest, selection, spans


def read_known_photos(
    job: JobConfig, weights: Weights, references: RowsByClass, scratch: Path, output: Store
) -> KnownPhotos:
    """Reads which photos other nights have scored with the same options as this job. Writes nothing to the output."""
    ledgers = find_ledgers(output, but_for=job.run_date)
    classes = sorted({name for ledger in ledgers for name in ledger.fingerprints})
    fits = text_fits(job.model)
    with ThreadPoolExecutor(_READERS) as pool:
        sets = pool.map(lambda name: find_or_make(output, name, job.prompts), classes)
        ensembles = [compose_ensemble(prompt_set, fits) for prompt_set in sets if prompt_set is not None]
    fingerprints = class_fingerprints(job, weights, ensembles, references)
    return read_known(output, ledgers, fingerprints, job.dataset.error_nights, Store(str(scratch)))


def class_fingerprints(
    job: JobConfig, weights: Weights, ensembles: Iterable[PromptEnsemble], references: RowsByClass
) -> dict[str, str]:
    """Returns JobConfig.class_fingerprint of each class that has prompts."""
    return {
        ensemble.class_name: job.class_fingerprint(
            ensemble.class_name,
            weights.sha256,
            ensemble.fingerprint,
            [image["image_id"] for image in references.get(ensemble.class_name, ())],
        )
        for ensemble in ensembles
    }


def find_references(job: JobConfig, source: ImageSource, classes: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Chooses the reference images of each class, as manifest rows; classes without any are left out.

    Empty where the job is zero-shot. Raises DatasetError where no class has any, ThresholdError where
    threshold.policy reference needs more of them.
    """
    return select_references(job, choose_all_references(job, source), classes)


def choose_all_references(job: JobConfig, source: ImageSource) -> dict[str, list[dict[str, Any]]]:
    """Chooses the reference images of every class that has some, whether it has images tonight or not."""
    if job.references is None:
        return {}
    rows = list_references(job.references, job.dataset, source, job.storage)
    return choose_references(rows, job.references.shots, job.references.seed)


def select_references(
    job: JobConfig, chosen: Mapping[str, list[dict[str, Any]]], classes: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Selects the references of tonight's classes, and warns of each class that has too few.

    Raises ThresholdError where threshold.policy reference needs more of them.
    """
    if job.references is None:
        return {}
    for line in describe_choice(chosen, classes, job.references.shots):
        logger.warning("%s", line)
    if job.threshold.policy == "reference":
        for name in classes:
            require_two(name, len(chosen.get(name, ())))
    return {name: chosen[name] for name in classes if name in chosen}


def find_earlier_peers(job: JobConfig, classes: Mapping[str, int], peers: RowsByClass, output: Store) -> RowsByClass:
    """Finds photos of earlier nights for the classes that have fewer photos tonight than peers.images."""
    if job.peers is None:
        return {}
    few = {name: CANDIDATES_PER_PEER * job.peers.images for name, count in classes.items() if count < job.peers.images}
    found = find_earlier(output, job.run_date, few) if few else {}
    known = {row["image_id"] for name in found for row in peers.get(name, ())}
    return {name: [row for row in rows if row["image_id"] not in known] for name, rows in found.items()}


def _log_few_images(options: Peers, classes: Mapping[str, int]) -> None:
    few = [name for name, count in classes.items() if count < options.min_images]
    if few:
        shown = _shorten({name: classes[name] for name in few})
        logger.info("classes with too few images for peers (peers.min_images), scored by language alone: %s", shown)


def _log_selection(selection: Selection, images: int, error_nights: int) -> None:
    logger.info(
        "%d images listed: %d were scored in another night, %d failed in %d nights and are given up, %d are left",
        selection.listed,
        selection.scored,
        selection.given_up,
        error_nights,
        images,
    )


def read_thresholds(job: JobConfig, weights: Weights, classes: Sequence[str]) -> tuple[bytes, Mapping[str, Thresholds]]:
    """Reads the calibrated thresholds that the job names: the content of the file, and the thresholds by class.

    Both are empty unless threshold.policy is labels. Raises ThresholdError where the file is missing, was made with
    another model, weights or method, or lacks a class.
    """
    table, place = _read_table(job), str(job.threshold.table)
    calibrated = parse_table(table, place) if table else None
    return table, select_thresholds(calibrated, place, job, weights.sha256, classes) if calibrated else {}


def _read_table(job: JobConfig) -> bytes:
    """Reads the file of calibrated thresholds; empty unless threshold.policy is labels."""
    if job.threshold.policy != "labels" or job.threshold.table is None:
        return b""
    folder, _, name = job.threshold.table.rpartition("/")
    try:
        return open_store(folder or ".", job.storage).read(name)
    except FileNotFoundError:
        raise ThresholdError(
            f"threshold.table {job.threshold.table} is missing; write it with alfa calibrate, or use another policy"
        ) from None


def obtain_ensembles(job: JobConfig, classes: Sequence[str], output: Store) -> tuple[RunPrompts, Usage]:
    """Obtains the prompts of the classes. Returns them, and what this call has spent on the LLM."""
    sets, usage = _prompt_sets(job, classes, output)
    for prompt_set in sets:
        logger.info("prompts of %s: %s", prompt_set.class_name, _origin(prompt_set))
    fits = text_fits(job.model)
    return record_prompts(sets, [compose_ensemble(prompt_set, fits) for prompt_set in sets]), usage


def name_run(
    job: JobConfig,
    weights: Weights,
    prompts: RunPrompts,
    references: RowsByClass,
    table: bytes = b"",
) -> Run:
    """Names the run of a job: its id is the night and a hash of everything that determines the rows.

    table: content of the file of calibrated thresholds.
    """
    prompts_fingerprint = "\n".join(f"{item.class_name}\0{item.fingerprint}" for item in prompts.ensembles)
    image_ids = [image["image_id"] for _, images in sorted(references.items()) for image in images]
    digest = hashlib.sha256(table).hexdigest()
    run_id = f"{job.run_date}-{job.result_fingerprint(weights.sha256, prompts_fingerprint, image_ids, digest)}"
    return Run(run_id, job, weights.label, weights.sha256)


def _prompt_sets(job: JobConfig, classes: Sequence[str], output: Store) -> tuple[list[PromptSet], Usage]:
    """Returns the prompt set of each class, and what was spent. Starts Ray only if an LLM has to be asked."""
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


def _origin(prompt_set: PromptSet) -> str:
    if prompt_set.source == "llm":
        return f"by {prompt_set.model}"
    return "bundled" if prompt_set.source == "bundled" else "base ensemble only; no LLM has described this class"


def _shorten(classes: Mapping[str, int], most: int = 8) -> str:
    shown = ", ".join(f"{name} {count}" for name, count in list(classes.items())[:most])
    return shown + (f" and {len(classes) - most} more" if len(classes) > most else "")
