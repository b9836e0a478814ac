"""`alfa gc`: removes files that no published night needs, and masks, maps, shards or rows of old nights."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timezone

from rich.console import Console
from rich.filesize import decimal

from jobs.console import make_table, print_json, print_line
from pipeline.lake import Retention, collect_garbage, find_oldest_kept
from pipeline.storage import Store


def run_gc(
    output: Store,
    console: Console,
    older_than_h: float,
    delete: bool,
    *,
    keep_nights: int | None = None,
    keep_days: int | None = None,
    table: bool = False,
    as_json: bool = False,
) -> int:
    """Counts the files that no commit refers to, or removes them with `delete`. Returns the exit code.

    Prints the number of files and bytes of each kind.

    Args:
        older_than_h: only files that were not written for so many hours.
        keep_nights: also remove masks, maps and shards of all but the last so many nights.
        keep_days: also remove masks, maps and shards of nights before the last so many days.
        table: of those nights, also remove rows, commits and records.
    """
    files: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    is_published = next(output.list("commits"), None) is not None
    today = datetime.now(timezone.utc).date()
    oldest = find_oldest_kept(output, keep_nights=keep_nights, keep_days=keep_days, today=today)
    retention = None if oldest is None else Retention(oldest, table)
    if is_published:
        for item in collect_garbage(output, older_than_h * 3600, delete=delete, retention=retention):
            files[item.kind] += 1
            sizes[item.kind] += item.size
    if as_json:
        kinds = {kind: {"files": count, "bytes": sizes[kind]} for kind, count in sorted(files.items())}
        total = {"files": files.total(), "bytes": sizes.total()}
        old_before = None if oldest is None else str(oldest)
        print_json({"output": output.uri(""), "deleted": delete, "old_before": old_before, "kinds": kinds, **total})
        return 0
    if not is_published:
        print_line(console, f"no night is published at {output.uri('')}, so there is nothing to remove")
        return 0
    counted = make_table(("kind", "files", "size"), left=("kind",))
    for kind, count in sorted(files.items()):
        counted.add_row(kind, str(count), decimal(sizes[kind]))
    counted.add_section()
    counted.add_row("all", str(files.total()), decimal(sizes.total()))
    console.print(counted)
    if retention is not None:
        what = "everything, rows too" if table else "masks, maps and shards, but not rows"
        print_line(console, f"includes {what} of the nights before {oldest}")
    if not delete and files:
        print_line(console, "nothing was removed; --delete removes these files")
    return 0
