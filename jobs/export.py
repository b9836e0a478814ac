"""`alfa export`: a published night for annotation and dataset tools."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from pipeline.lake import export_rows, find_night, read_rows
from pipeline.storage import Store, open_store, paths
from schemas.job import Storage, parse_job, read_job_yaml


def run_export(output: Store, run: str, kind: str, target: str | None, storage: Storage, console: Console) -> int:
    """Writes the files of a format to `target`, default exports/<run_id>/<format> in the output. Returns the exit code.

    Raises ExportError where the run is not published.
    """
    commit = find_night(output, run)
    job = parse_job(read_job_yaml(output.read(paths.run_key(commit["run_id"], "job.yaml")).decode()))
    images = job.dataset.images
    source = open_store(images.rpartition("/")[0] if images.endswith((".parquet", ".csv")) else images, job.storage)
    folder, prefix = (open_store(target, storage), "") if target else (output, f"exports/{commit['run_id']}/{kind}/")
    with tempfile.TemporaryDirectory(prefix="alfa-export-") as scratch:
        rows = read_rows(output, commit, masks=kind == "coco")
        count = export_rows(kind, rows, commit, source.key_of, Path(scratch))
        for path in sorted(Path(scratch).iterdir()):
            folder.upload(prefix + path.name, path)
    left_out = f"; {count.errors} error rows are left out" if count.errors else ""
    console.print(
        f"{count.images} images, {count.regions} regions to {escape(folder.uri(prefix.rstrip('/')))}{left_out}",
        highlight=False,
        soft_wrap=True,
    )
    return 0
