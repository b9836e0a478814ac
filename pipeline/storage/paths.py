"""Where everything lies below the output: names to keys, and nothing else."""

from __future__ import annotations

import datetime
import hashlib
from urllib.parse import quote

from pipeline.storage.names import safe_path, safe_segment
from pipeline.storage.store import Store

TABLE = "scores"
LEDGER = "ledger"

_LONGEST_VALUE = 200
"""Bytes of a quoted partition value; file systems allow 255 a name."""
_NULL = "__HIVE_DEFAULT_PARTITION__"
"""What readers take for no class at all, also where it is quoted."""


def run_key(run_id: str, name: str) -> str:
    """A file of a run: job.yaml, prompts.json, stats.json, a manifest."""
    return f"runs/{run_id}/{name}"


def report_key(run_id: str) -> str:
    """The page that shows a run."""
    return run_key(run_id, "report/index.html")


def manifest_key(run_id: str, digest: str) -> str:
    """The manifest is immutable, so its name is its content: images that arrive later make another one."""
    return run_key(run_id, f"manifest-{digest}.parquet")


def shard_key(folder: str, shard_id: str) -> str:
    """The commit record of a shard: it is written last, so a shard that is listed is finished."""
    return f"{folder}/{shard_id}.parquet"


def masked_shards(run_id: str, digest: str) -> str:
    """Folder of the shards with the masks of thresholds of this digest."""
    return run_key(run_id, f"masked-{digest}")


def finished_shards(store: Store, folder: str) -> set[str]:
    """Ids of the shards that are finished, by one listing."""
    return {
        info.key.rsplit("/", 1)[-1].removesuffix(".parquet")
        for info in store.list(folder)
        if info.key.endswith(".parquet")
    }


def evaluation_key(run_id: str, name: str) -> str:
    """A file of the evaluation of a run: metrics.parquet, metrics.json, metrics.md, images.parquet, pictures."""
    return run_key(run_id, f"evaluation/{name}")


def memory_key(run_id: str, class_name: str) -> str:
    """The patches of a class's references and peers, made once a run."""
    return run_key(run_id, f"memory/{safe_segment(class_name)}.safetensors")


def span_key(run_id: str, class_name: str) -> str:
    """Which values are black and white in a class's photos of more than 8 bits, decided once a run."""
    return run_key(run_id, f"spans/{safe_segment(class_name)}.json")


def driver_lease(run_id: str) -> str:
    """Held by the one driver that works on a run."""
    return run_key(run_id, "driver")


def night_lease(run_date: datetime.date) -> str:
    """Held by the one driver that publishes a night."""
    return f"runs/{run_date}-publish"


def mask_key(run_date: datetime.date, version: str, class_name: str, image_key: str) -> str:
    """The mask of an image; different images never share one, and none leaves the folder.

    version: of the rows that the mask belongs to. Two runs of one night have masks of their own, so that a published
    row and its mask always come from the same run.
    """
    return f"masks/run_date={run_date}/{version}/{safe_segment(class_name)}/{safe_path(image_key)}.png"


def map_key(run_date: datetime.date, version: str, class_name: str, image_key: str) -> str:
    """The raw anomaly map of an image."""
    return f"maps/run_date={run_date}/{version}/{safe_segment(class_name)}/{safe_path(image_key)}.png"


def partition(run_date: datetime.date, class_name: str) -> str:
    """Hive partition of the table, quoted as Spark and Arrow do.

    A class whose quoted name is too long for a file system, or is Hive's word for null, has the partition of its
    beginning, `~` and a hash.
    """
    quoted = quote(class_name, safe="")
    if len(quoted) > _LONGEST_VALUE or class_name == _NULL:
        digest = hashlib.blake2b(class_name.encode(), digest_size=16).hexdigest()
        start = class_name
        while len(quote(f"{start}~{digest}", safe="")) > _LONGEST_VALUE:
            start = start[:-1]
        quoted = quote(f"{start}~{digest}", safe="")
    return f"run_date={run_date}/class_name={quoted}"


def table_key(run_date: datetime.date, class_name: str) -> str:
    """The one file of a class and night. Its name is fixed: replacing it is a single atomic write, so a reader of the
    table sees a class's old rows or its new ones, never both and never none."""
    return f"{TABLE}/{partition(run_date, class_name)}/part-00000.parquet"


def version_key(run_id: str, manifest_digest: str, run_date: datetime.date, class_name: str, sha256: str) -> str:
    """The same file under a name that tells its content, so that it is never written again: what a commit names."""
    name = f"part-00000-{sha256[:16]}.parquet"
    return run_key(run_id, f"table-{manifest_digest}/{partition(run_date, class_name)}/{name}")


def mask_version(run_id: str, thresholds_digest: str | None = None) -> str:
    """Names the masks of a run among those of the night's other runs; thresholds_digest: of those that follow from the
    run's own scores."""
    version = run_id.rpartition("-")[2]
    return f"{version}-{thresholds_digest}" if thresholds_digest else version


def commit_key(run_date: datetime.date | str) -> str:
    """The one object that says what belongs to a night."""
    return f"commits/{run_date}.json"


def ledger_key(run_date: datetime.date | str, digest: str) -> str:
    """The ids of a night's photos. digest: of the commit that it belongs to."""
    return f"{LEDGER}/{run_date}/{digest}.parquet"
