"""`alfa demo`: runs the whole pipeline offline, on real images from the repository."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
from rich.console import Console
from rich.markup import escape

from jobs.console import make_table
from jobs.score import run_score
from schemas.job import parse_job, read_job_yaml

DEMO = Path(__file__).parent.parent / "infra" / "demo"


class DemoError(RuntimeError):
    """The demo's images are missing."""


def run_demo(output: str, console: Console) -> int:
    """Scores the demo's images into a folder and prints the most anomalous ones. Returns the exit code.

    Raises DemoError outside a checkout, and what run_score raises.
    """
    if not DEMO.is_dir():
        raise DemoError(f"{DEMO} is missing; run the demo in a checkout of the repository, which has its images")
    job = parse_job(
        read_job_yaml((DEMO / "job.yaml").read_text()),
        flags={"dataset.images": str(DEMO / "images"), "output.uri": output},
    )
    code = run_score(job, console)
    _print_most_anomalous(Path(output) / "scores" / f"run_date={job.run_date}", console)
    return code


def _print_most_anomalous(night: Path, console: Console, most: int = 8) -> None:
    partitions = pa.schema([("class_name", pa.string())])
    rows = ds.dataset(night, partitioning=ds.partitioning(partitions, flavor="hive")).to_table()
    left = ("class", "image", "defect nearest to its strongest region", "mask")
    table = make_table(("score", *left), left=left, title="most anomalous images")
    for row in rows.sort_by([("score", "descending")]).slice(0, most).to_pylist():
        photo, mask = Path(row["image_uri"]), Path(row["mask_uri"])
        defect = row["regions"][0]["defect"] if row["regions"] else "none"
        table.add_row(
            f"{row['score']:.3f}",
            escape(row["class_name"]),
            escape(f"{photo.parent.name}/{photo.name}"),
            escape(defect or "not described"),
            escape(f"{mask.parent.name}/{mask.name}"),
        )
    console.print(table)
