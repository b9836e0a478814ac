"""Renders a report as one HTML page of bounded size, which needs no network, no build and no server."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import timezone
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from pipeline.images import describe_left_out
from pipeline.report import drift
from pipeline.report.drift import ClassDrift
from pipeline.report.loading import load_report
from pipeline.report.model import ClassFacts, Exhibit, ListedImage, Report
from pipeline.storage import Store, paths
from schemas.job import EMBEDDED_NOTE, JobConfig, dump_job_yaml
from schemas.prompts import Usage, UsedPrompts
from schemas.records import Commit
from schemas.text import one_line

LARGEST = 15_000_000
"""Largest page in bytes. load_report bounds the text; photos that would exceed this size are left out."""

_DASH = "\u2013"
_BINS = 40
_BAR_HEIGHT = 32
_BAR_LENGTH = 60
_MOST_CLASSES = 500
_MOST_PROMPT_SETS = 100
_MOST_REGIONS = 12


def write_report(output: Store, commit: Commit) -> str:
    """Writes the page of a published night into its run's folder. Returns its address. Raises ReportError, OSError."""
    key = paths.report_key(commit.run_id)
    output.write(key, render(load_report(output, commit)).encode("utf-8", "replace"))
    return output.uri(key)


def render(report: Report, largest: int = LARGEST) -> str:
    """Renders the page. All text of the report is escaped, both in the markup and in the JSON of the script.

    largest: size in bytes up to which photos are added.
    """
    script, style = _asset("report.js"), _asset("report.css")
    numbers = {facts.name: number for number, facts in enumerate(report.classes)}
    places = {exhibit.image.image_id: place for place, exhibit in enumerate(report.exhibits)}
    span = _score_span(report.classes)
    shown = sorted(report.classes, key=lambda facts: -facts.anomalous)[:_MOST_CLASSES]
    exhibits = [_exhibit_data(exhibit) for exhibit in report.exhibits]
    data = {
        "classes": [one_line(name) for name in numbers],
        "prompts": _prompt_data(report, numbers),
        "heat": _heat_ranges(report, numbers),
        "images": _image_data([*report.images, *report.failures], numbers, places),
        "exhibits": exhibits,
    }
    context = {
        "report": report,
        "model_note": _model_note(report),
        "anomalous": sum(facts.anomalous for facts in report.classes),
        "failed": sum(report.errors.values()),
        "usage": report.stats.usage if report.stats else Usage(),
        "span": span,
        "classes": [_class_line(facts, numbers[facts.name], span) for facts in sorted(shown, key=lambda one: one.name)],
        "prompts": [_prompt_set(used, report) for used in report.prompts[:_MOST_PROMPT_SETS]],
        "bounds": _bounds(report),
        "selection": report.stats.selection if report.stats else None,
        "left_out": describe_left_out(report.stats.left_out if report.stats else {}),
        "since": report.comparison,
        "drifts": _most_drifted(report.comparison.classes),
        "others": [item.class_name for item in report.comparison.classes if item.is_of_other_photos and item.images[0]],
        "trend": _trend_lines(report.comparison.trend),
        "changes": drift.CHANGES,
        "psi_threshold": drift.PSI_THRESHOLD,
        "p_value": drift.P_VALUE,
        "run": list(_run_facts(report)),
        "job": dump_job_yaml(report.job),
        "style": Markup(style),
        "script": Markup(script),
        "style_hash": _csp_hash(style),
        "script_hash": _csp_hash(script),
    }
    template = _template()
    without_photos = template.render(context, data=_script_json(data))
    _add_photos(exhibits, report.exhibits, largest - len(without_photos.encode("utf-8", "replace")))
    return template.render(context, data=_script_json(data))


def _model_note(report: Report) -> tuple[str, str] | None:
    """Returns a note on the model, as title and sentence, if the night was scored by an embedded one; else None."""
    if report.stats is None:
        return None
    if report.stats.embedded_model:
        return "Embedded model.", f"{report.model} is {EMBEDDED_NOTE}."
    if report.stats.demonstration_model:  # a night of an earlier version
        return "Demonstration model.", f"The scores of {report.model} say nothing about real defects."
    return None


def _script_json(data: Any) -> Markup:
    """Encodes JSON as ASCII without markup characters, so that it cannot end its script element or start a comment."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _csp_hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _asset(name: str) -> str:
    return (importlib.resources.files("pipeline.report") / "page" / name).read_text("utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "line": one_line,
        "count": lambda value: f"{value:,}",
        "percent": lambda value: f"{value:.2%}",
        "share": lambda value, whole: f"{value / whole:.1%}" if whole else "0 %",
        "score": lambda value: _DASH if value is None else f"{value:.3f}",
        "cost": lambda value: "cost unknown" if value is None else f"{value:.4f} USD",
        "moment": lambda moment: f"{moment.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC",
    }
    return environment.from_string(_asset("report.html.j2"))


def _score_span(classes: Sequence[ClassFacts]) -> tuple[float, float]:
    """Returns the range of all histograms. It contains all scores and thresholds."""
    values = np.concatenate([facts.scores for facts in classes] or [np.zeros(0, np.float32)])
    values = np.append(values, [facts.threshold for facts in classes if facts.threshold is not None])
    if not values.size:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    return (low, high) if high - low > 1e-6 else (low - 0.005, high + 0.005)


def _class_line(facts: ClassFacts, number: int, span: tuple[float, float]) -> dict[str, Any]:
    counts, edges = np.histogram(np.clip(facts.scores, *span), bins=_BINS, range=span)
    tallest = max(1, counts.max(initial=0))
    middles = (edges[:-1] + edges[1:]) / 2
    cut = facts.threshold
    bars = [
        {
            "height": round(_BAR_HEIGHT * float(np.sqrt(count / tallest)), 1),
            "anomalous": cut is not None and middle >= cut,
        }
        for count, middle in zip(counts.tolist(), middles.tolist(), strict=True)
    ]
    empty = not facts.scores.size
    return {
        "facts": facts,
        "number": number,
        "median": None if empty else float(np.median(facts.scores)),
        "highest": None if empty else float(facts.scores.max()),
        "bars": [] if empty else bars,
        "cut": None if cut is None else round((cut - span[0]) / (span[1] - span[0]) * 5 * _BINS, 1),
        "label": ""
        if empty
        else f"{facts.scores.size} scores from {facts.scores.min():.3f} to {facts.scores.max():.3f}",
    }


def _most_drifted(classes: Sequence[ClassDrift]) -> list[ClassDrift]:
    """Returns the classes to show: those that drift first, sorted by name, and of the others those with highest PSI."""
    shown = sorted(classes, key=lambda item: (not item.drifted, -(item.psi or 0)))[:_MOST_CLASSES]
    return sorted(shown, key=lambda item: (not item.drifted, item.class_name))


def _trend_lines(trend: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Adds bars for both shares to each night. The longest bar belongs to the night with the highest share."""
    lines = [{**night, "share": night["anomalous"] / night["images"] if night["images"] else 0.0} for night in trend]
    for name in ("share", "error_rate"):
        most = max((line[name] for line in lines), default=0.0)
        for line in lines:
            line[f"{name}_bar"] = round(_BAR_LENGTH * line[name] / most, 1) if most else 0
    return lines


def _image_data(
    images: Sequence[ListedImage], numbers: Mapping[str, int], places: Mapping[str, int]
) -> dict[str, list[Any]]:
    """Returns the images by column, which is compact. state: 0 normal, 1 anomalous, 2 error."""
    return {
        "class": [numbers[image.class_name] for image in images],
        "key": [image.key for image in images],
        "score": [None if image.score is None else round(image.score, 5) for image in images],
        "state": [2 if image.error_type else int(image.is_anomalous) for image in images],
        "note": [
            f"{image.error_type}: {image.error_message}" if image.error_type else image.defect for image in images
        ],
        "exhibit": [places.get(image.image_id) for image in images],
    }


def _exhibit_data(exhibit: Exhibit) -> dict[str, Any]:
    return {
        "photo": None,
        "photo_fault": exhibit.photo_fault,
        "uri": exhibit.uri,
        "mask_link": exhibit.mask_link,
        "region_count": len(exhibit.regions),
        "regions": [
            [
                *(region[name] for name in ("x", "y", "width", "height", "area")),
                round(region["peak"], 4),
                region["defect"],
                region["peer"],
            ]
            for region in exhibit.regions[:_MOST_REGIONS]
        ],
        "explanation": [
            [item["prompt"], item["defect"], round(item["weight"], 5), round(item["similarity"], 4)]
            for item in exhibit.explanation
        ],
        "kept": None if exhibit.kept is None else "".join("01"[kept] for kept in exhibit.kept),
        "grid": None if exhibit.grid is None else _encode_grid(exhibit.grid),
        "grid_scale": None if exhibit.grid is None else _scale(exhibit.grid),
        "grid_width": None if exhibit.grid is None else exhibit.grid.shape[1],
        "width": exhibit.width,
        "height": exhibit.height,
        **{
            name: round(getattr(exhibit, name), 6)
            for name in ("score_global", "score_local", "threshold", "mask_threshold", "mask_area")
        },
    }


def _add_photos(data: Sequence[dict[str, Any]], exhibits: Sequence[Exhibit], budget: int) -> None:
    """Adds photos in order, as long as they fit into `budget` bytes."""
    for item, exhibit in zip(data, exhibits, strict=True):
        if exhibit.photo is None:
            continue
        photo = base64.b64encode(exhibit.photo).decode()
        budget -= len(photo)
        if budget < 0:
            item["photo_fault"] = "left out, because the page has reached its largest size"
        else:
            item["photo"] = photo


def _encode_grid(grid: NDArray[np.float32]) -> str:
    """Encodes a map row by row as little-endian 16-bit values in base64. value / 65535 x _scale(grid) gives the map."""
    return base64.b64encode(np.rint(np.clip(grid / _scale(grid), 0, 1) * 65535).astype("<u2").tobytes()).decode()


def _scale(grid: NDArray[np.float32]) -> int:
    """Returns the largest possible value of a map: 1, or 2 with references alone."""
    return 2 if grid.max(initial=0) > 1 else 1


def _heat_ranges(report: Report, numbers: Mapping[str, int]) -> dict[int, list[float]]:
    """Returns the range of colours of each class, so that its images can be compared by eye."""
    grids: dict[int, list[NDArray[np.float32]]] = {}
    for exhibit in report.exhibits:
        if exhibit.grid is not None:
            grids.setdefault(numbers[exhibit.image.class_name], []).append(exhibit.grid.ravel())
    return {number: _range(np.concatenate(parts)) for number, parts in grids.items()}


def _range(values: NDArray[np.float32]) -> list[float]:
    return [round(float(np.quantile(values, 0.05)), 5), round(float(values.max()), 5)]


def _prompt_data(report: Report, numbers: Mapping[str, int]) -> dict[int, list[Any]]:
    """Returns text, side (0 normal, 1 anomalous) and defect of each prompt, in the order of `kept`, by class.

    Only classes in the gallery are included.
    """
    classes = {exhibit.image.class_name for exhibit in report.exhibits}
    return {
        numbers[name]: [[item.text, int(item.side == "anomalous"), item.defect] for item in used.ensemble.prompts]
        for used in report.prompts
        if (name := used.ensemble.class_name) in classes
    }


def _prompt_set(used: UsedPrompts, report: Report) -> dict[str, Any]:
    name, prompts = used.ensemble.class_name, used.ensemble.prompts
    records = [item.kept for item in report.exhibits if item.image.class_name == name and item.kept is not None]
    records = [kept for kept in records if len(kept) == len(prompts)]
    shares = np.mean(records, axis=0).tolist() if records else [None] * len(prompts)
    usage, sides = used.usage, [prompt.side for prompt in prompts]
    asked = f"{usage.calls} calls, {usage.prompt_tokens + usage.completion_tokens:,} tokens"
    price = "cost unknown" if usage.cost_usd is None else f"{usage.cost_usd:.4f} USD"
    origins = {"llm": f"by {used.model}", "bundled": "bundled description", "base": "base ensemble only"}
    return {
        "name": one_line(name),
        "origin": f"{origins[used.ensemble.source]}, {used.created_at:%Y-%m-%d}",
        "cost": f"{asked}, {price}" if usage.calls else "no LLM call",
        "normal": sides.count("normal"),
        "anomalous": sides.count("anomalous"),
        "lines": [
            {"prompt": prompt, "kept": _DASH if share is None else f"{share:.0%}"}
            for prompt, share in zip(prompts, shares, strict=True)
        ],
    }


def _bounds(report: Report) -> str:
    scored = report.commit.rows - sum(report.errors.values())
    gallery, listed = len(report.exhibits), len(report.images)
    if gallery == scored:
        held = f"Gallery and list hold all {scored:,} scored images."
    else:
        lines = "all" if listed == scored else f"the most anomalous {listed:,}; the table in the lake has all"
        held = (
            f"The gallery holds the most anomalous {gallery:,} of {scored:,} scored images, classes in equal shares; "
            f"the list {lines}."
        )
    return f"{held} Hover over a card to see the photo alone. Names are relative to {report.root}"


def _run_facts(report: Report) -> Iterator[tuple[str, str]]:
    commit, stats, job = report.commit, report.stats, report.job
    yield "Run", commit.run_id
    yield "Manifest", commit.manifest
    yield "Images", job.dataset.images
    yield "Output", job.output.uri
    yield "Model", report.model
    yield "Weights, SHA-256", f"{report.weights_sha256[:16]}…"
    yield "Adaptation", job.method.adaptation
    yield "Aligner", str(job.resolved_method.aligner)
    yield "Threshold", _describe_threshold(job)
    if stats is not None:
        yield "Scored by the last job", f"{stats.scored_by_this_job:,} images"
        yield from stats.versions.items()


def _describe_threshold(job: JobConfig) -> str:
    """Describes where thresholds come from, as rows do, with the number that sets them."""
    options = job.threshold
    numbers = {"fixed": options.value, "quantile": options.quantile, "reference": options.reference_quantile}
    number = numbers.get(options.policy)
    return options.source if number is None else f"{options.source} {number:g}"
