"""Prints the results of commands to stdout: tables and lines for people, or one JSON document for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNLIMITED = 100_000
"""Width for files and pipes, in characters: large enough that nothing is cut or wrapped."""


def open_console(*, quiet: bool = False) -> Console:
    """Opens stdout for tables and lines. Only a terminal gets colours and wrapping; NO_COLOR turns its colours off.

    quiet: print nothing.
    """
    return Console(quiet=quiet, width=None if sys.stdout.isatty() else _UNLIMITED)


def make_table(
    columns: Sequence[str], *, left: Collection[str] = (), whole: Collection[str] = (), title: str | None = None
) -> Table:
    """Makes an empty table. Columns are right-aligned, except those named in `left`.

    On a narrow terminal, cells are folded except in the columns named in `whole`. Nothing is cut off.
    """
    table = Table(title=None if title is None else Text(title), title_justify="left")
    for column in columns:
        table.add_column(
            column, justify="left" if column in left else "right", overflow="fold", no_wrap=column in whole
        )
    return table


def print_line(console: Console, text: str) -> None:
    """Prints a line unchanged: without markup, highlighting or wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """Prints a JSON document to stdout. The command must print nothing else there."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
