"""`alfa diff`: two nights side by side."""

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
from rich.table import Table
from rich.text import Text

from pipeline.report import ClassDrift, drift
from pipeline.storage import Store

logger = logging.getLogger(__name__)

_SHOWN = 20
_STYLES = {"drifts": "bold red", "no photos any more": "yellow"}


class NightError(ValueError):
    """A night that was asked for is not published."""


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
    """Compares two published nights; by default the last one with the one before it. Returns the exit code: 1 where a
    class drifts and fail_on_drift asks for it, else 0.

    json_file: where to write all of it as JSON too. Raises NightError.
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
    table = Table(title=f"{pair[0]} to {pair[1]}", title_justify="left")
    for column in ("class", "images", "errors", "anomalous", "median score", "PSI", "KS", "p", "verdict"):
        table.add_column(column, justify="left" if column in ("class", "verdict") else "right")
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
    console.print(
        f"A class drifts where PSI >= {psi:g} (how far its scores have moved; below 0.1 is calm) and p < "
        f"{drift.P_VALUE:g} (KS: that chance does so).",
        highlight=False,
        soft_wrap=True,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _print_images(images: pa.Table, console: Console) -> None:
    counts = {change: 0 for change in drift.CHANGES}
    for change in images.column("change").to_pylist():
        counts[change] += 1
    said = ", ".join(f"{count} {drift.CHANGES[change]}" for change, count in counts.items())
    console.print(f"\nanomalous now, or no longer: {said}", highlight=False)
    for row in images.slice(0, _SHOWN).to_pylist():
        scores = f"{_number(row['score_before'])} > {_number(row['score_after'])}"
        change = f"{drift.CHANGES[row['change']]:<12}"
        line = f"  {change}  {scores}  {escape(row['class_name'])}  {escape(row['image_uri'])}"
        console.print(line, highlight=False, soft_wrap=True)
    if images.num_rows > _SHOWN:
        console.print(f"  and {images.num_rows - _SHOWN} more; --json FILE holds all", highlight=False)


def _print_trend(trend: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(title="last nights", title_justify="left")
    for column in ("night", "images", "errors", "anomalous", "images/s"):
        table.add_column(column, justify="left" if column == "night" else "right")
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
