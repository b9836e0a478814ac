"""What commands print to stdout: tables and lines for people, one JSON document for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNLIMITED = 100_000
"""Columns of a file or a pipe, which cuts and wraps nothing."""


def open_console(*, quiet: bool = False) -> Console:
    """Opens stdout for tables and lines. Colours and widths are for terminals; NO_COLOR takes the colours there too.

    quiet: print nothing.
    """
    return Console(quiet=quiet, width=None if sys.stdout.isatty() else _UNLIMITED)


def make_table(
    columns: Sequence[str], *, left: Collection[str] = (), whole: Collection[str] = (), title: str | None = None
) -> Table:
    """Makes an empty table, whose columns are set right unless they are named in `left`.

    On a narrow terminal cells are folded, save those of the columns in `whole`; nothing is cut off.
    """
    table = Table(title=None if title is None else Text(title), title_justify="left")
    for column in columns:
        table.add_column(
            column, justify="left" if column in left else "right", overflow="fold", no_wrap=column in whole
        )
    return table


def print_line(console: Console, text: str) -> None:
    """Prints a line as it is: brackets are no markup, numbers get no colours, and long ones are not wrapped."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """Prints a JSON document to stdout, which then holds nothing else."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
