"""`alfa gc`: removes what no commit refers to."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from pipeline.lake import collect_garbage
from pipeline.storage import Store


def run_gc(output: Store, console: Console, older_than_h: float, delete: bool) -> int:
    """Prints how many files and bytes of each kind are (to be) removed. Returns the exit code."""
    if next(output.list("commits"), None) is None:
        console.print(f"no night is committed at {escape(output.uri(''))}, so nothing is known to be superseded")
        return 0
    files: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for item in collect_garbage(output, older_than_h * 3600, delete=delete):
        files[item.kind] += 1
        sizes[item.kind] += item.size
    table = Table()
    for column in ("kind", "files", "size"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, count in sorted(files.items()):
        table.add_row(kind, str(count), decimal(sizes[kind]))
    table.add_section()
    table.add_row("all", str(files.total()), decimal(sizes.total()))
    console.print(table)
    if not delete and files:
        console.print("nothing was removed; --delete removes these files")
    return 0
