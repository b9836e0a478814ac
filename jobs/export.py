"""`alfa export`: writes a published night for annotation and dataset tools."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from jobs.console import print_line
from pipeline.lake import ExportError, export_rows, find_night, read_rows
from pipeline.storage import Store, open_store, paths
from schemas.job import Storage, parse_job, read_job_yaml


def run_export(output: Store, run: str, kind: str, target: str | None, storage: Storage, console: Console) -> int:
    """Exports a night in a format, and prints how many images and regions were written. Returns the exit code.

    run: a night (YYYY-MM-DD) or a run's id. kind: coco, fiftyone or labelstudio. target: folder or URI for the files;
    None: exports/<run_id>/<format> in the output. Raises ExportError where the run is not published, or its masks were
    removed and the format needs them.
    """
    commit = find_night(output, run)
    if kind == "coco" and commit.cleared_at:
        raise ExportError(f"--to coco needs masks; those of night {commit.run_date} were removed by alfa gc")
    job = parse_job(read_job_yaml(output.read(paths.run_key(commit.run_id, "job.yaml")).decode()))
    images = job.dataset.images
    source = open_store(images.rpartition("/")[0] if images.endswith((".parquet", ".csv")) else images, job.storage)
    folder, prefix = (open_store(target, storage), "") if target else (output, f"exports/{commit.run_id}/{kind}/")
    with tempfile.TemporaryDirectory(prefix="alfa-export-") as scratch:
        rows = read_rows(output, commit, masks=kind == "coco")
        count = export_rows(kind, rows, commit, source.key_of, Path(scratch))
        for path in sorted(Path(scratch).iterdir()):
            folder.write(prefix + path.name, path)
    left_out = f"; {count.errors} error rows are left out" if count.errors else ""
    where = folder.uri(prefix.rstrip("/"))
    print_line(console, f"{count.images} images with {count.regions} regions are written to {where}{left_out}")
    return 0
