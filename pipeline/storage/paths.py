"""The keys of everything in the output. No other module builds them."""

from __future__ import annotations

import datetime
import hashlib
from urllib.parse import quote

from pipeline.storage.names import safe_path, safe_segment
from pipeline.storage.store import Store

TABLE = "scores"
LEDGER = "ledger"

_LONGEST_VALUE = 200
"""Maximal bytes of a quoted partition value; file systems allow 255 bytes per name."""
_NULL = "__HIVE_DEFAULT_PARTITION__"
"""The value that readers take for null, even if it is quoted."""


def run_key(run_id: str, name: str) -> str:
    """Returns the key of a file in a run's folder: job.yaml, prompts.json, stats.json, a manifest."""
    return f"runs/{run_id}/{name}"


def report_key(run_id: str) -> str:
    """Returns the key of a run's report."""
    return run_key(run_id, "report/index.html")


def manifest_key(run_id: str, digest: str) -> str:
    """Returns the key of a manifest. digest: of its content, so that a manifest with other images has another key."""
    return run_key(run_id, f"manifest-{digest}.parquet")


def shard_key(folder: str, shard_id: str) -> str:
    """Returns the key of a shard's rows. They are written last, so a shard that is listed is finished."""
    return f"{folder}/{shard_id}.arrow"


def masked_shards(run_id: str, digest: str) -> str:
    """Returns the folder of the shards whose masks were made with the thresholds of this digest."""
    return run_key(run_id, f"masked-{digest}")


def finished_shards(store: Store, folder: str) -> set[str]:
    """Lists the ids of the finished shards in a folder."""
    return {
        info.key.rsplit("/", 1)[-1].removesuffix(".arrow") for info in store.list(folder) if info.key.endswith(".arrow")
    }


def evaluation_key(run_id: str, name: str) -> str:
    """Returns the key of a file of a run's evaluation: metrics.parquet, metrics.json, images.parquet, a picture."""
    return run_key(run_id, f"evaluation/{name}")


def memory_key(run_id: str, class_name: str) -> str:
    """Returns the key of the patches of a class's references and peers, which are made once per run."""
    return run_key(run_id, f"memory/{safe_segment(class_name)}.safetensors")


def span_key(run_id: str, class_name: str) -> str:
    """Returns the key of a class's black and white levels for photos of more than 8 bits, decided once per run."""
    return run_key(run_id, f"spans/{safe_segment(class_name)}.json")


def driver_lease(run_id: str) -> str:
    """Returns the name of the lease that the one driver of a run holds."""
    return run_key(run_id, "driver")


def night_lease(run_date: datetime.date) -> str:
    """Returns the name of the lease that the one publisher of a night holds."""
    return f"runs/{run_date}-publish"


def mask_key(run_date: datetime.date, version: str, class_name: str, image_key: str) -> str:
    """Returns the key of an image's mask. Different images never share one, and none lies outside the folder.

    version: see mask_version. Each run of a night has its own masks, so that a published row and its mask always come
    from the same run.
    """
    return f"masks/run_date={run_date}/{version}/{safe_segment(class_name)}/{safe_path(image_key)}.png"


def map_key(run_date: datetime.date, version: str, class_name: str, image_key: str) -> str:
    """Returns the key of an image's raw anomaly map. version: see mask_version."""
    return f"maps/run_date={run_date}/{version}/{safe_segment(class_name)}/{safe_path(image_key)}.png"


def partition(run_date: datetime.date, class_name: str) -> str:
    """Returns the Hive partition of a class and night, quoted as Spark and Arrow do.

    If the quoted name of the class is too long for a file system, or is Hive's word for null, the value is the start of
    the name, `~` and a hash.
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
    """Returns the key of the table's one file of a class and night.

    The name is fixed, so replacing the file is one atomic write, and a reader of the table sees either the old rows of
    the class or the new ones.
    """
    return f"{TABLE}/{partition(run_date, class_name)}/part-00000.parquet"


def version_key(run_id: str, manifest_digest: str, run_date: datetime.date, class_name: str, sha256: str) -> str:
    """Returns the key of the immutable copy of a table's file, which the commit names. sha256: of its content."""
    name = f"part-00000-{sha256[:16]}.parquet"
    return run_key(run_id, f"table-{manifest_digest}/{partition(run_date, class_name)}/{name}")


def mask_version(run_id: str, thresholds_digest: str | None = None) -> str:
    """Names the masks of a run among those of the night's other runs.

    thresholds_digest: digest of the thresholds, if they follow from the run's own scores.
    """
    version = run_id.rpartition("-")[2]
    return f"{version}-{thresholds_digest}" if thresholds_digest else version


def commit_key(run_date: datetime.date | str) -> str:
    """Returns the key of the commit of a night."""
    return f"commits/{run_date}.json"


def ledger_key(run_date: datetime.date | str, digest: str) -> str:
    """Returns the key of a night's ledger. digest: of the commit to which it belongs."""
    return f"{LEDGER}/{run_date}/{digest}.parquet"
