"""`alfa diff`: compares two nights: changed verdicts, drift of scores, the trend of the last nights."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from jobs.console import make_table, print_line
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
    """Compares two published nights, by default the last one with the one before it. Returns the exit code.

    That is 1 where a class drifts and fail_on_drift is set, else 0. psi: the population stability index from which a
    class counts as drifting. json_file: also write all of it there, as JSON. Raises NightError where a night is not
    published.
    """
    published = drift.published_nights(output)
    pair = _choose(published, before, after, output)
    if pair is None:
        logger.info("only one night is published at %s; there is nothing to compare it with yet", output.uri(""))
        return 0
    old, new = (drift.read_night(output, night) for night in pair)
    classes = drift.drift(old, new, psi)
    images = drift.changed_images(old, new)
    trend = drift.read_trend(output, [night for night in published if night <= pair[1]][-drift.TREND_NIGHTS :])
    drifted = [item.class_name for item in classes if item.drifted]
    if json_file is not None:
        report = {
            "before": pair[0],
            "after": pair[1],
            "thresholds": {"psi": psi, "p_value": drift.P_VALUE},
            "drifted": drifted,
            "classes": [asdict(item) for item in classes],
            "images": images.to_pylist(),
            "nights": trend,
        }
        json_file.write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
    _print_classes(classes, pair, psi, console)
    _print_images(images, console)
    _print_trend(trend, console)
    if drifted:
        logger.warning("scores drift: %s", ", ".join(drifted))
    return 1 if drifted and fail_on_drift else 0


def _choose(published: Sequence[str], before: str | None, after: str | None, output: Store) -> tuple[str, str] | None:
    for night in (before, after):
        if night is not None and night not in published:
            raise NightError(
                f"night {night} is not published at {output.uri('')}; there are: {', '.join(published[-10:]) or 'none'}"
            )
    if not published:
        raise NightError(f"no night is published at {output.uri('')}")
    after = after or published[-1]
    before = before or next((night for night in reversed(published) if night < after), None)
    return None if before is None else (before, after)


def _print_classes(classes: Sequence[ClassDrift], pair: tuple[str, str], psi: float, console: Console) -> None:
    columns = ("class", "images", "errors", "anomalous", "median score", "PSI", "KS", "p", "verdict")
    table = make_table(columns, left=("class", "verdict"), title=f"{pair[0]} to {pair[1]}")
    for item in classes:
        changed = f" ({' and '.join(item.changed)} changed)" if item.changed else ""
        table.add_row(
            escape(item.class_name),
            *(f"{old} > {new}" for old, new in (item.images, item.errors, item.anomalous)),
            " > ".join(_number(value) for value in item.median),
            *(_number(value) for value in (item.psi, item.ks, item.p_value)),
            Text.assemble((item.verdict, _STYLES.get(item.verdict, "")), changed),
        )
    console.print(table)
    print_line(
        console,
        f"A class drifts where PSI, how far its scores have moved, is {psi:g} or more (below 0.1 is calm), and p, how "
        f"likely chance alone moves them so (Kolmogorov-Smirnov), is below {drift.P_VALUE:g}.",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _print_images(images: pa.Table, console: Console) -> None:
    counts = {change: 0 for change in drift.CHANGES}
    for change in images.column("change").to_pylist():
        counts[change] += 1
    said = ", ".join(f"{count} {drift.CHANGES[change]}" for change, count in counts.items())
    print_line(console, f"\nanomalous now, or no longer: {said}")
    for row in images.slice(0, _SHOWN).to_pylist():
        scores = f"{_number(row['score_before'])} > {_number(row['score_after'])}"
        change = f"{drift.CHANGES[row['change']]:<12}"
        print_line(console, f"  {change}  {scores}  {row['class_name']}  {row['image_uri']}")
    if images.num_rows > _SHOWN:
        print_line(console, f"  and {images.num_rows - _SHOWN} more; --json FILE holds all of them")


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
