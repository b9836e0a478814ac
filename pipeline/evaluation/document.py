"""Writes documents of headings, texts, tables and pictures, as Markdown or as one HTML page."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.measure import METRICS
from pipeline.evaluation.published import Published
from schemas.text import one_line

HEADERS = ("image AUROC", "AUPR", "F1-max", "pixel AUROC", "AUPR", "F1-max", "PRO")
_NUMBERS = frozenset((*HEADERS, "good", "anomalous"))


@dataclass(frozen=True)
class Heading:
    """A heading. The first one is the title of the document, the others are sections."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Sheet:
    """A table of text cells. Columns of numbers are right-aligned."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG. name: its path relative to the document."""

    name: str
    data: bytes
    caption: str


Block = Heading | Text | Sheet | Picture


def percent(value: float | None) -> str:
    """Formats a share as a percentage with one decimal, such as `93.2`; a dash for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def metric_cells(row: Mapping[str, Any]) -> list[str]:
    """Formats the seven metrics of a row of schema EVALUATION in percent, with the standard deviation over draws."""

    def cell(name: str) -> str:
        spread = row.get(f"{name}_spread")
        return percent(row[name]) + ("" if spread is None else f" ± {percent(spread)}")

    return [cell(name) for name in METRICS]


def published_cells(row: Published) -> list[str]:
    """Formats the seven metrics of a published result in percent."""
    return ["-" if (value := getattr(row, name)) is None else f"{value:.1f}" for name in METRICS]


def to_markdown(blocks: Sequence[Block]) -> bytes:
    """Writes the document as GitHub's Markdown; pictures are linked relative to it."""
    parts = []
    for number, block in enumerate(blocks):
        if isinstance(block, Heading):
            parts.append(f"{'##' if number else '#'} {_md(block.text)}")
        elif isinstance(block, Text):
            parts.append(_md(block.text))
        elif isinstance(block, Picture):
            parts.append(f"{_md(block.caption)}\n\n![{_md(block.caption)}]({block.name})")
        else:
            rule = ["--:" if name in _NUMBERS else ":--" for name in block.header]
            lines = [block.header, rule, *block.rows]
            parts.append(
                "\n".join("| " + " | ".join(cells if cells is rule else map(_md, cells)) + " |" for cells in lines)
            )
    return ("\n\n".join(parts) + "\n").encode()


def to_html(blocks: Sequence[Block]) -> bytes:
    """Writes the document as one self-contained HTML page, which loads nothing."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "evaluation")
    body = []
    for number, block in enumerate(blocks):
        if isinstance(block, Heading):
            level = "h2" if number else "h1"
            body.append(f"<{level}>{_html(block.text)}</{level}>")
        elif isinstance(block, Text):
            body.append(f"<p>{_html(block.text)}</p>")
        elif isinstance(block, Picture):
            source = f"data:image/png;base64,{base64.b64encode(block.data).decode()}"
            body.append(
                f"<figure><figcaption>{_html(block.caption)}</figcaption>"
                f'<img src="{source}" alt="{_html(block.caption)}"></figure>'
            )
        else:
            kinds = ["n" if name in _NUMBERS else "w" for name in block.header]
            head = "".join(
                f'<th class="{kind}">{_html(cell)}</th>' for kind, cell in zip(kinds, block.header, strict=True)
            )
            rows = "".join(
                "<tr>" + "".join(f'<td class="{k}">{_html(c)}</td>' for k, c in zip(kinds, row, strict=True)) + "</tr>"
                for row in block.rows
            )
            body.append(f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_html(title)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    ).encode()


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}"
    "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}"
    "th,td{padding:.25rem .6rem;border-bottom:1px solid #d9dee3}th{background:#f2f4f6}"
    ".w{text-align:left}.n{text-align:right;font-variant-numeric:tabular-nums}"
    "figure{margin:1.2rem 0}img{max-width:100%}figcaption{margin-bottom:.3rem;color:#4a5560}"
)


def _html(text: str) -> str:
    return html.escape(one_line(text))


def _md(text: str) -> str:
    """Escapes text from outside, so that Markdown shows it unchanged."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(one_line(text), quote=False))
