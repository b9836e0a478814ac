"""`alfa plan`: shows what a night would do and cost. Writes nothing, asks no LLM, starts no Ray."""

from __future__ import annotations

import heapq
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape

from jobs.console import make_table, print_json, print_line
from jobs.planning import choose_all_references, list_night, name_run, open_source, read_thresholds, select_references
from pipeline.alfa import locate_weights, text_fits
from pipeline.images import describe_left_out
from pipeline.lake import Selection, published_nights, read_commit, read_stats
from pipeline.prompts import compose_ensemble, find_or_make, record_prompts
from pipeline.scoring import Manifest, identify_shards
from pipeline.storage import Store, open_store, paths
from schemas.job import JobConfig
from schemas.prompts import PromptSet, Usage
from schemas.records import Commit, RunStats

_FILES_SHOWN = 5
"""How many files are named as largest, odd or empty."""
_ODD_FACTOR = 10
"""A file counts as odd if it is this many times larger or smaller than the median."""
_NIGHTS_READ, _RUNS_READ = 20, 5
"""How many of the last nights are read, and from how many runs among them, with the job's model, rates are taken."""
_LEAST_HOURS_SHOWN = 0.01
"""Fewer hours of cores or GPUs are not shown."""
_OBJECTS_SAMPLED = 500
"""How many masks, or stored prompt sets, are read to estimate sizes and costs."""


class File(NamedTuple):
    """A file and its size in bytes."""

    uri: str
    bytes: int


@dataclass(frozen=True)
class Files:
    """The file sizes, in bytes, of the images to score. largest, odd, empty: examples of such files."""

    images: int
    bytes: int
    unknown: int
    median: int | None
    largest: Sequence[File]
    odd: Sequence[File]
    odd_count: int
    empty: Sequence[str]
    empty_count: int


@dataclass(frozen=True)
class ClassPlan:
    """A class of the night.

    prompts: where its prompts come from: llm, bundled, base, or `to be asked` if the LLM has not described it yet.
    shots, peers: number of known-good images and of photos of the night that each photo is compared with, provided
    that all of them can be read.
    """

    class_name: str
    images: int
    prompts: str
    shots: int
    peers: int


@dataclass(frozen=True, eq=False)
class LastNight:
    """A published night: its commit, and the stats of its run; None where stats.json is missing."""

    commit: Commit
    stats: RunStats | None


@dataclass(frozen=True)
class Pace:
    """The pace of the last runs with this model. cores, gpus: those that their actors held; None where unknown."""

    runs: int
    images_per_second: float
    cores: float | None
    gpus: float | None

    def hours(self, images: int) -> dict[str, float | None]:
        """Estimates, for so many images, the hours of scoring, and the hours of cores and GPUs."""
        hours = images / self.images_per_second / 3600
        return {
            "hours": hours,
            "core_hours": None if self.cores is None else hours * self.cores,
            "gpu_hours": None if self.gpus is None else hours * self.gpus,
        }


@dataclass(frozen=True)
class NightPlan:
    """What a night would do.

    left_out: number of objects that are no images, by suffix. run_id, finished_shards, is_published: None while prompts
    are missing, because the run's id depends on them. usage_a_class: average cost of describing a class so far; None if
    the LLM need not be asked, or has described none.
    """

    run_date: str
    source: str
    layout: str
    output: str
    selection: Selection | None
    left_out: Mapping[str, int]
    classes: Sequence[ClassPlan]
    files: Files
    shards: int
    run_id: str | None
    finished_shards: int | None
    is_published: bool | None
    usage_a_class: Usage | None
    pace: Pace | None
    result_bytes_an_image: float | None


def run_plan(job: JobConfig, console: Console, *, as_json: bool = False) -> int:
    """Prints what a night would do and cost. Returns the exit code.

    Raises what scoring would raise before its first image, except errors of the LLM and the cluster.
    """
    plan = plan_night(job)
    if as_json:
        print_json(_document(plan))
        return 0
    _print_classes(plan, console)
    for name, text in _describe(plan):
        print_line(console, f"{name:>9}  {text}")
    return 0


def plan_night(job: JobConfig) -> NightPlan:
    """Plans a night from the images, the output and its last runs."""
    output = open_store(job.output.uri, job.storage)
    source = open_source(job, output)
    weights = locate_weights(job.model)
    chosen = choose_all_references(job, source)
    left_out: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="alfa-") as scratch:
        manifest, selection, _ = list_night(job, weights, source, chosen, Path(scratch), output, left_out)
        classes = list(manifest.classes)
        table, _ = read_thresholds(job, weights, classes)
        references = select_references(job, chosen, classes)
        sets = {name: find_or_make(output, name, job.prompts) for name in classes}
        shard_ids = list(identify_shards(manifest, job.engine.shard_size))
        files = _summarise_files(manifest)
    run_id = finished = is_published = None
    known = [prompt_set for prompt_set in sets.values() if prompt_set is not None]
    if len(known) == len(classes):
        fits = text_fits(job.model)
        prompts = record_prompts(known, [compose_ensemble(prompt_set, fits) for prompt_set in known])
        run = name_run(job, weights, prompts, references, table)
        run_id, finished = run.run_id, len(paths.finished_shards(output, run.shards) & set(shard_ids))
        commit = read_commit(output, job.run_date)
        is_published = commit is not None and (commit.run_id, commit.manifest) == (run_id, manifest.digest)
    nights = _read_last_nights(output)
    return NightPlan(
        run_date=str(job.run_date),
        source=source.store.uri(source.table_key or ""),
        layout=source.layout,
        output=output.uri(""),
        selection=selection,
        left_out=dict(left_out),
        classes=[
            ClassPlan(
                name, images, _describe_prompts(sets[name]), len(references.get(name, ())), _count_peers(job, images)
            )
            for name, images in manifest.classes.items()
        ],
        files=files,
        shards=len(shard_ids),
        run_id=run_id,
        finished_shards=finished,
        is_published=is_published,
        usage_a_class=_usual_usage(output, job.prompts.llm) if None in sets.values() else None,
        pace=_find_pace(nights, weights.label),
        result_bytes_an_image=_result_bytes(output, nights[0]) if nights else None,
    )


def _describe_prompts(prompt_set: PromptSet | None) -> str:
    return "to be asked" if prompt_set is None else prompt_set.source


def _summarise_files(manifest: Manifest) -> Files:
    """Summarises the sizes in two passes: one for the median, one for the files far from it."""
    sizes = np.concatenate([np.empty(0), *(_sizes_of(batch) for batch in manifest.batches(["size"]))])
    known = sizes[~np.isnan(sizes)]
    median = int(np.median(known)) if len(known) else None
    largest: list[File] = []
    odd: list[File] = []
    empty: list[str] = []
    odd_count = 0
    for batch in manifest.batches(["uri", "size"]):
        uris, some = batch.column("uri"), _sizes_of(batch)
        top = np.argsort(np.nan_to_num(some, nan=-1.0))[-_FILES_SHOWN:]
        largest += [_file_at(batch, place) for place in top.tolist() if some[place] > 0]
        largest = heapq.nlargest(_FILES_SHOWN, largest, key=lambda file: file.bytes)
        empty += [uris[place].as_py() for place in np.flatnonzero(some == 0)[: _FILES_SHOWN - len(empty)].tolist()]
        if median:
            far = np.flatnonzero((some > _ODD_FACTOR * median) | ((some > 0) & (some < median / _ODD_FACTOR)))
            odd_count += len(far)
            odd += [_file_at(batch, place) for place in far[: _FILES_SHOWN - len(odd)].tolist()]
    return Files(
        images=manifest.images,
        bytes=int(known.sum()),
        unknown=len(sizes) - len(known),
        median=median,
        largest=largest,
        odd=odd,
        odd_count=odd_count,
        empty=empty,
        empty_count=int((known == 0).sum()),
    )


def _sizes_of(batch: pa.RecordBatch) -> NDArray[np.float64]:
    """Returns the sizes of manifest rows in bytes; NaN where they are unknown."""
    return np.asarray(batch.column("size").to_numpy(zero_copy_only=False), np.float64)


def _file_at(batch: pa.RecordBatch, place: int) -> File:
    return File(batch.column("uri")[place].as_py(), batch.column("size")[place].as_py())


def _usual_usage(output: Store, model: str | None) -> Usage | None:
    """Averages the usage per class of this LLM in this output; None if it has described no class yet."""
    found = []
    for info in islice(output.list("prompts"), _OBJECTS_SAMPLED):
        if info.key.endswith(".json") and ".claim-" not in info.key:
            prompt_set = json.loads(output.read(info.key))
            if prompt_set.get("source") == "llm" and prompt_set.get("model") == model:
                found.append(Usage.model_validate(prompt_set["usage"]))
    if not found:
        return None
    costs = [usage.cost_usd for usage in found if usage.cost_usd is not None]
    return Usage(
        calls=round(sum(usage.calls for usage in found) / len(found)),
        prompt_tokens=round(sum(usage.prompt_tokens for usage in found) / len(found)),
        completion_tokens=round(sum(usage.completion_tokens for usage in found) / len(found)),
        cost_usd=sum(costs) / len(costs) if costs else None,
    )


def _find_pace(nights: Sequence[LastNight], model: str) -> Pace | None:
    """Returns the median pace of the last runs that scored with this model; None if there are none."""
    stats = [night.stats for night in nights if night.stats is not None and night.stats.model == model]
    found = [each for each in stats if each.scoring_images_per_second][:_RUNS_READ]
    if not found:
        return None
    rate = float(np.median([each.rate for each in found]))
    actors = [each.actors for each in found if each.actors is not None]
    cores = float(np.median([each.count * each.cpus for each in actors])) if actors else None
    gpus = float(np.median([each.count * each.gpus for each in actors])) if actors else None
    return Pace(len(found), rate, cores, gpus)


def _read_last_nights(output: Store) -> list[LastNight]:
    """Reads the last nights that have rows, the latest first."""
    found: list[LastNight] = []
    for night in reversed(published_nights(output)):
        commit = read_commit(output, night)
        if commit and commit.rows:
            found.append(LastNight(commit, read_stats(output, commit.run_id)))
        if len(found) == _NIGHTS_READ:
            break
    return found


def _result_bytes(output: Store, night: LastNight) -> float:
    """Estimates the bytes per image that a night has left in the lake.

    Counted are the table and its immutable copy, the shards, and the average size of some masks.
    """
    commit = night.commit
    rows = 2 * sum(entry.bytes for entry in commit.files)
    shards = sum(info.size or 0 for info in output.list(commit.shards)) if commit.shards else 0
    masks = [info.size or 0 for info in islice(output.list(f"masks/run_date={commit.run_date}"), _OBJECTS_SAMPLED)]
    return float((rows + shards) / commit.rows + (sum(masks) / len(masks) if masks else 0))


def _count_peers(job: JobConfig, images: int) -> int:
    return 0 if job.peers is None or images < job.peers.min_images else min(images, job.peers.images)


def _document(plan: NightPlan) -> dict[str, Any]:
    document = asdict(plan)
    document["cost"] = None if plan.pace is None else plan.pace.hours(plan.files.images)
    document["result_bytes"] = _result_size(plan)
    document["usage_a_class"] = None if plan.usage_a_class is None else plan.usage_a_class.model_dump()
    for name in ("largest", "odd"):
        document["files"][name] = [file._asdict() for file in getattr(plan.files, name)]
    return document


def _result_size(plan: NightPlan) -> int | None:
    return None if plan.result_bytes_an_image is None else round(plan.result_bytes_an_image * plan.files.images)


def _print_classes(plan: NightPlan, console: Console) -> None:
    columns = ["class", "images", "prompts", "peers"]
    columns += ["references"] if any(item.shots for item in plan.classes) else []
    table = make_table(columns, left=("class", "prompts"), title=f"night {plan.run_date}")
    for item in plan.classes:
        cells = [escape(item.class_name), str(item.images), item.prompts, str(item.peers), str(item.shots)]
        table.add_row(*cells[: len(columns)])
    console.print(table)


def _describe(plan: NightPlan) -> Iterator[tuple[str, str]]:
    files, asked = plan.files, [item.class_name for item in plan.classes if item.prompts == "to be asked"]
    yield "images", f"{plan.source}, layout {plan.layout}"
    if (selection := plan.selection) is not None:
        left_out = f"{selection.scored} scored in other nights, {selection.given_up} given up"
        yield "new", f"{files.images} of {selection.listed} listed; {left_out}"
    if plan.left_out:
        yield "skipped", f"by suffix: {describe_left_out(plan.left_out)}"
    unknown = f", {files.unknown} of unknown size" if files.unknown else ""
    median = f", median {decimal(files.median)}" if files.median is not None else ""
    yield "files", f"{files.images} images of {len(plan.classes)} classes, {decimal(files.bytes)}{median}{unknown}"
    for file in files.largest:
        yield "largest", f"{decimal(file.bytes)}  {file.uri}"
    if files.odd_count:
        yield "odd", f"{files.odd_count} more than {_ODD_FACTOR} times larger or smaller than the median, such as"
        for file in files.odd:
            yield "", f"{decimal(file.bytes)}  {file.uri}"
    if files.empty_count:
        yield "empty", f"{files.empty_count} files have no bytes, such as {files.empty[0]}"
    finished = f", {plan.finished_shards} of them finished already" if plan.finished_shards else ""
    yield "shards", f"{plan.shards}{finished}"
    yield "run", _describe_run(plan)
    yield "LLM", _describe_llm(asked, plan.usage_a_class)
    yield "time", _describe_time(plan)
    size = _result_size(plan)
    yield "results", "unknown: no night is published here yet" if size is None else f"about {decimal(size)}"
    yield "output", plan.output


def _describe_run(plan: NightPlan) -> str:
    if plan.run_id is None:
        return "unknown until the LLM has described the classes"
    return f"{plan.run_id}{', published already: nothing is left to do' if plan.is_published else ''}"


def _describe_llm(asked: Sequence[str], usage: Usage | None) -> str:
    if not asked:
        return "is not asked"
    said = f"is asked for {len(asked)} classes: {', '.join(asked[:8])}{' and others' if len(asked) > 8 else ''}"
    if usage is None:
        return f"{said}; cost unknown, because it has described no class for this output yet"
    tokens = len(asked) * (usage.prompt_tokens + usage.completion_tokens)
    cost = "cost unknown" if usage.cost_usd is None else f"about {len(asked) * usage.cost_usd:.4f} USD"
    return f"{said}; about {tokens} tokens, {cost}, going by earlier classes"


def _describe_time(plan: NightPlan) -> str:
    if not plan.files.images:
        return "nothing is left to score: seconds"
    if plan.pace is None:
        return "unknown: no run has scored with this model here yet"
    hours = plan.pace.hours(plan.files.images)
    gpus, cores = hours["gpu_hours"], hours["core_hours"]
    held = ""
    for hours_held, unit in ((gpus, "GPU hours"), (cores, "core hours")):
        if not held and hours_held and hours_held >= _LEAST_HOURS_SHOWN:
            held = f", {hours_held:.2f} {unit}"
    runs = f"the last {plan.pace.runs} runs" if plan.pace.runs > 1 else "the last run"
    seconds = plan.files.images / plan.pace.images_per_second
    return f"{_describe_seconds(seconds)} of scoring{held}, at the {plan.pace.images_per_second:g} images/s of {runs}"


def _describe_seconds(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(1, round(seconds))} s"
