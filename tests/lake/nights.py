"""Publishes generated nights: runs of two classes, and nights of photos with versions."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import pyarrow as pa

from pipeline.lake import Selection, find_ledgers, publish_night, read_known
from pipeline.storage import Run, Store
from schemas.job import JobConfig, parse_job
from schemas.records import Commit
from schemas.tables import MANIFEST
from tests.nights import FOURTH, NIGHT, run_of, write_shard

CLASSES = ("bolt", "nut")
ROWS = 40
"""Of each class in a run of make_run."""
ODD = ("1", "001", "1.0", "1e3", "true", "null", "NaN", "2026-01-01", "a/b=%41", "__HIVE_DEFAULT_PARTITION__")
"""Classes that a reader may take for numbers, dates, nothing, or each other."""
DAY_S = 86_400.0
METHOD, OTHER = "a" * 32, "b" * 32
"""Fingerprints."""

Photo = tuple[str, str]
"""Address and ETag."""


def make_run(
    output: Store, name: str, score: float = 0.5, night: str = NIGHT, classes: Sequence[str] = CLASSES, **values: object
) -> tuple[Run, list[str]]:
    """A run whose shards lie in the store: rows of all classes, each with the run's id. values: of other columns."""
    run, shards = run_of(output, name, night), ["one", "two"]
    for shard in shards:
        rows = [
            {
                "class_name": class_name,
                "image_key": f"{shard}-{number}",
                "score": score + number / 1000,
                "prompt_fingerprint": "p1",
                **values,
            }
            for class_name in classes
            for number in range(ROWS // 2)
        ]
        write_shard(output, run, shard, rows)
    return run, shards


def odd_partitions() -> set[str]:
    """What readers call the classes of ODD: the one that they take for null goes by another name."""
    *plain, null = ODD
    return {*plain, f"{null}~{hashlib.blake2b(null.encode(), digest_size=16).hexdigest()}"}


def job_for(output: Store, night: str = "2026-01-02", **lake: str) -> JobConfig:
    document = {"dataset": {"images": "x"}, "output": {"uri": output.uri("")}, "run_date": night}
    return parse_job({**document, "lake": {"format": "iceberg", **lake}})


def image_id(photo: Photo) -> str:
    return hashlib.blake2b("\0".join(photo).encode(), digest_size=16).hexdigest()


def photos_named(*names: str) -> list[Photo]:
    return [(name, "v1") for name in names]


def publish(
    output: Store,
    night: str,
    photos: Mapping[Photo, str],
    fingerprints: Mapping[str, str] | None = None,
    run: str = "run",
    class_of: Mapping[Photo, str] | None = None,
    spans: Mapping[str, tuple[float, float]] | None = None,
) -> Commit:
    """Publishes photos with their status as a night."""
    made = run_of(output, hashlib.sha256(run.encode()).hexdigest()[:12], night)
    rows = [
        {
            "class_name": (class_of or {}).get(photo, "nut"),
            "image_key": photo[0],
            "image_id": image_id(photo),
            "image_etag": photo[1],
            "status": status,
            "score": 0.5 if status == "ok" else None,
        }
        for photo, status in photos.items()
    ]
    write_shard(output, made, "one", rows)
    marks = {"nut": METHOD} if fingerprints is None else fingerprints
    return publish_night(made, "m", made.shards, ["one"] if rows else [], output, "test", marks, spans)


def left(
    output: Store,
    photos: list[Photo],
    fingerprints: Mapping[str, str] | None = None,
    error_nights: int = 4,
    class_name: str = "nut",
    selection: Selection | None = None,
    mended: Store | None = None,
    tonight: str = FOURTH,
) -> list[Photo]:
    """The photos of a listing that tonight is left with."""
    rows = [
        {"uri": photo[0], "key": photo[0], "class_name": class_name, "etag": photo[1], "image_id": image_id(photo)}
        for photo in photos
    ]
    listed = pa.Table.from_pylist(rows, schema=MANIFEST).to_batches(3)
    ledgers = find_ledgers(output, but_for=date.fromisoformat(tonight))
    known = read_known(output, ledgers, fingerprints or {class_name: METHOD}, error_nights, mended)
    counted = selection or Selection()
    batches = known.leave_out(listed, counted)
    return [(row["uri"], row["etag"]) for batch in batches for row in batch.to_pylist()]


def age(folder: Path, seconds: float = 2 * DAY_S) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


def keys(output: Store) -> set[str]:
    return {info.key for info in output.list()}
