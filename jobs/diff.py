"""`alfa diff`: compares two nights: changed verdicts, drift of scores, the trend of the last nights."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from jobs.console import make_table, print_line
from pipeline.lake import find_night_before, published_nights
from pipeline.report import ClassDrift, drift
from pipeline.storage import Store

logger = logging.getLogger(__name__)

_SHOWN = 20
_STYLES = {"drifts": "bold red", "no photos any more": "yellow"}


class NightError(ValueError):
    """A night to compare is not published."""


def run_diff(
    output: Store,
    before: str | None,
    after: str | None,
    console: Console,
    *,
    psi: float = drift.PSI_THRESHOLD,
    fail_on_drift: bool = False,
    json_file: Path | None = None,
) -> int:
    """Compares two published nights, by default the last two, and prints the differences. Returns the exit code.

    The code is 1 if a class drifts and fail_on_drift is set, else 0. psi: the population stability index from which a
    class counts as drifting. json_file: also write the whole comparison there, as JSON. Raises NightError where a night
    is not published.
    """
    published = published_nights(output)
    pair = _choose(published, before, after, output)
    if pair is None:
        logger.info("only one night is published at %s; there is nothing to compare it with yet", output.uri(""))
        return 0
    compared = {name: drift.compare_class(name, old, new, psi) for name, old, new in drift.read_pairs(output, *pair)}
    classes = [found for found, _ in compared.values()]
    changes = {name: found for name, (_, found) in compared.items()}
    trend = drift.read_trend(output, [night for night in published if night <= pair[1]][-drift.TREND_NIGHTS :])
    drifted = [item.class_name for item in classes if item.drifted]
    if json_file is not None:
        report = {
            "before": pair[0],
            "after": pair[1],
            "thresholds": {"psi": psi, "p_value": drift.P_VALUE},
            "drifted": drifted,
            "classes": [{**asdict(item), "rates": item.rates} for item in classes],
            "images": _read_changes(output, changes),
            "nights": trend,
        }
        json_file.write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
    _print_classes(classes, pair, psi, console)
    _print_changes(output, classes, changes, console)
    _print_trend(trend, console)
    if drifted:
        logger.warning("scores drift: %s", ", ".join(drifted))
    return 1 if drifted and fail_on_drift else 0


def _choose(published: Sequence[str], before: str | None, after: str | None, output: Store) -> tuple[str, str] | None:
    for night in (before, after):
        if night is not None and night not in published:
            raise NightError(
                f"night {night} is not published at {output.uri('')}; the last published nights: "
                f"{', '.join(published[-10:]) or 'none'}"
            )
    if not published:
        raise NightError(f"no night is published at {output.uri('')}")
    after = after or published[-1]
    before = before or find_night_before(output, after)
    return None if before is None else (before, after)


def _print_classes(classes: Sequence[ClassDrift], pair: tuple[str, str], psi: float, console: Console) -> None:
    columns = ("class", "images", "errors", "anomalous", "share", "median score", "PSI", "KS", "p", "verdict")
    table = make_table(columns, left=("class", "verdict"), title=f"{pair[0]} to {pair[1]}")
    for item in classes:
        changed = f" ({' and '.join(item.changed)} changed)" if item.changed else ""
        table.add_row(
            escape(item.class_name),
            *(f"{old} > {new}" for old, new in (item.images, item.errors, item.anomalous)),
            " > ".join("-" if value is None else f"{value:.1%}" for value in item.rates),
            " > ".join(_number(value) for value in item.median),
            *(_number(value) for value in (item.psi, item.ks, item.p_value)),
            Text.assemble((item.verdict, _STYLES.get(item.verdict, "")), changed),
        )
    console.print(table)
    print_line(
        console,
        f"A class drifts if its PSI is {psi:g} or more and its p below {drift.P_VALUE:g}. PSI measures how far its "
        f"scores have moved (below 0.1: hardly), p how likely chance alone moves them so far (Kolmogorov-Smirnov).",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _read_changes(output: Store, changes: Mapping[str, drift.Changes], most: int | None = None) -> list[dict[str, Any]]:
    """Reads the changed photos of all classes, the highest score first. most: at most so many of each class."""
    rows = [
        row
        for name, found in changes.items()
        for row in (found if most is None else found.first(most)).read(output, name)
    ]
    return sorted(rows, key=lambda row: (-row["score_after"], row["class_name"], row["image_uri"]))


def _print_changes(
    output: Store, classes: Sequence[ClassDrift], changes: Mapping[str, drift.Changes], console: Console
) -> None:
    counts = sum((Counter(found.count()) for found in changes.values()), Counter())
    said = ", ".join(f"{counts[change]} {words}" for change, words in drift.CHANGES.items())
    console.print(f"\nanomalous now, or no longer: {said}", highlight=False)
    for row in _read_changes(output, changes, _SHOWN)[:_SHOWN]:
        scores = f"{_number(row['score_before'])} > {_number(row['score_after'])}"
        change = f"{drift.CHANGES[row['change']]:<12}"
        line = f"  {change}  {scores}  {escape(row['class_name'])}  {escape(row['image_uri'])}"
        console.print(line, highlight=False, soft_wrap=True)
    if counts.total() > _SHOWN:
        console.print(f"  and {counts.total() - _SHOWN} more; --json FILE holds all", highlight=False)
    others = [item.class_name for item in classes if item.is_of_other_photos and item.images[0]]
    if others:
        console.print(
            f"not compared photo by photo, because most photos are new since the night before (see the rates above): "
            f"{escape(', '.join(others))}",
            highlight=False,
            soft_wrap=True,
        )


def _print_trend(trend: Sequence[dict[str, Any]], console: Console) -> None:
    table = make_table(("night", "images", "errors", "anomalous", "images/s"), left=("night",), title="last nights")
    for night in trend:
        rate = night["images_per_second"]
        table.add_row(
            night["run_date"],
            str(night["images"]),
            f"{night['error_rate']:.2%}",
            str(night["anomalous"]),
            "-" if rate is None else f"{rate:g}",
        )
    console.print(table)
