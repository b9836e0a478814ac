"""`alfa gc`: removes files that no published night needs any more."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.filesize import decimal

from jobs.console import make_table, print_json, print_line
from pipeline.lake import collect_garbage
from pipeline.storage import Store


def run_gc(output: Store, console: Console, older_than_h: float, delete: bool, *, as_json: bool = False) -> int:
    """Counts, or with `delete` removes, files that no commit refers to. Returns the exit code.

    older_than_h: hours for which a file must have lain untouched. Prints files and bytes of each kind.
    """
    files: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    is_published = next(output.list("commits"), None) is not None
    if is_published:
        for item in collect_garbage(output, older_than_h * 3600, delete=delete):
            files[item.kind] += 1
            sizes[item.kind] += item.size
    if as_json:
        kinds = {kind: {"files": count, "bytes": sizes[kind]} for kind, count in sorted(files.items())}
        total = {"files": files.total(), "bytes": sizes.total()}
        print_json({"output": output.uri(""), "deleted": delete, "kinds": kinds, **total})
        return 0
    if not is_published:
        print_line(console, f"no night is published at {output.uri('')}, so nothing is known to be superseded")
        return 0
    table = make_table(("kind", "files", "size"), left=("kind",))
    for kind, count in sorted(files.items()):
        table.add_row(kind, str(count), decimal(sizes[kind]))
    table.add_section()
    table.add_row("all", str(files.total()), decimal(sizes.total()))
    console.print(table)
    if not delete and files:
        print_line(console, "nothing was removed; --delete removes these files")
    return 0
