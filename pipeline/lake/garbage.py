"""What no commit refers to: found by streamed listings, and removed while no driver can be at work on it.

Only files of known kinds are ever named; whatever else lies in the output is kept, and so are prompts, the table, the
commits and a run's records (job.yaml, stats.json, its report).
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from itertools import chain, groupby
from typing import Any

from pipeline.lake.commits import read_commit
from pipeline.lake.ledger import find_ledger
from pipeline.storage import ObjectInfo, Store, leases, paths

logger = logging.getLogger(__name__)

_RUN_ID = re.compile(r"\d{4}-\d\d-\d\d-[0-9a-f]+")
_NIGHT = re.compile(r"\d{4}-\d\d-\d\d")


@dataclass(frozen=True)
class Garbage:
    """A file that nothing refers to."""

    kind: str
    key: str
    size: int


def collect_garbage(output: Store, older_than_s: float, *, delete: bool) -> Iterator[Garbage]:
    """The files, last written longer ago than older_than_s, that no commit refers to; delete: each is removed first.

    A run whose driver is alive is left alone. Removal takes the driver's place by its lease, and reads the commit again
    while it holds it, so that a run which starts meanwhile waits, and then finds its files whole or gone, not half.
    """
    before = time.time() - older_than_s
    for name, infos in groupby(output.list("runs"), lambda info: info.key.split("/")[1]):
        if _RUN_ID.fullmatch(name):
            yield from _sweep(output, name, infos, before, delete)
        elif name.partition(".claim-")[1]:
            yield from _sweep_leases(output, f"runs/{name.partition('.claim-')[0]}", infos, before, delete)
    for kind in ("masks", "maps"):
        for (night, version), infos in groupby(output.list(kind), lambda info: tuple(info.key.split("/")[1:3])):
            run_id = f"{night.removeprefix('run_date=')}-{version.partition('-')[0]}"
            if _RUN_ID.fullmatch(run_id):
                yield from _sweep(output, run_id, infos, before, delete)
    for night, infos in groupby(output.list(paths.LEDGER), lambda info: info.key.split("/")[1]):
        if _NIGHT.fullmatch(night):
            yield from _sweep_ledgers(output, night, infos, before, delete)
    for info in output.leftovers():
        if _is_older(info, before):
            if delete:
                output.delete(info.key)
            yield Garbage("unfinished writes", info.key, info.size or 0)


def _sweep(output: Store, run_id: str, infos: Iterable[ObjectInfo], before: float, delete: bool) -> Iterator[Garbage]:
    commit = read_commit(output, run_id[:10])
    found = (
        Garbage(kind, info.key, info.size or 0)
        for info in infos
        if _is_older(info, before) and (kind := _kind(info.key, run_id, commit))
    )
    first = next(found, None)
    if first is None:
        return
    name = paths.driver_lease(run_id)
    if not delete:
        if (holder := leases.holder(output, name)) is not None:
            _spare(run_id, holder)
        else:
            yield from chain([first], found)
        return
    lease = leases.try_acquire(output, name, leases.new_owner(), leases.LEASE_S)
    if lease is None:
        _spare(run_id, leases.holder(output, name))
        return
    with lease.held(leases.LEASE_S, discard=True):
        commit = read_commit(output, run_id[:10])
        for item in chain([first], found):
            lease.check()
            if item.kind != "leases" and _kind(item.key, run_id, commit):
                output.delete(item.key)
                yield item
        yield from _predecessors(lease)


def _sweep_ledgers(
    output: Store, night: str, infos: Iterable[ObjectInfo], before: float, delete: bool
) -> Iterator[Garbage]:
    """Those of commits that were replaced, or never written. Whoever publishes the night is waited for elsewhere."""
    old = [info for info in infos if _is_older(info, before)]
    name = paths.night_lease(date.fromisoformat(night))

    def find() -> list[Garbage]:
        ledger = find_ledger(output, night)
        kept = None if ledger is None else ledger.key
        return [Garbage("ledgers", info.key, info.size or 0) for info in old if info.key != kept]

    if not find():
        return
    if not delete:
        yield from find() if leases.holder(output, name) is None else ()
    elif lease := leases.try_acquire(output, name, leases.new_owner(), leases.LEASE_S):
        with lease.held(leases.LEASE_S):
            for item in find():
                lease.check()
                output.delete(item.key)
                yield item


def _sweep_leases(
    output: Store, name: str, infos: Iterable[ObjectInfo], before: float, delete: bool
) -> Iterator[Garbage]:
    found = [Garbage("leases", info.key, info.size or 0) for info in infos if _is_older(info, before)]
    if not found:
        return
    if not delete:
        yield from found if leases.holder(output, name) is None else ()
    elif lease := leases.try_acquire(output, name, leases.new_owner(), leases.LEASE_S):
        with lease.held(leases.LEASE_S, discard=True):
            yield from _predecessors(lease)


def _predecessors(lease: leases.Lease) -> Iterator[Garbage]:
    return (Garbage("leases", key, lease.store.info(key).size or 0) for key in lease.keys[:-1])


def _kind(key: str, run_id: str, commit: Mapping[str, Any] | None) -> str | None:
    """What a file of a run is, if nothing refers to it; None for what is to be kept."""
    top, second, third = (*key.split("/", 3), "", "")[:3]
    used = commit if commit is not None and commit["run_id"] == run_id else None
    # A commit of before the folder was written down is taken to need all that could be its own.
    folder = None if used is None else used.get("shards")
    if top in ("masks", "maps"):
        digest = (folder or "").partition("/masked-")[2]
        kept = used and (folder is None or third == paths.mask_version(run_id, digest or None))
        return None if kept else top
    if third == "shards":
        return None if used else "shards"
    if third.startswith("masked-"):
        kept = used and (folder is None or folder == f"{top}/{second}/{third}")
        return None if kept else "shards with masks"
    if third.startswith("table-"):
        return None if used and any(key == entry["key"] for entry in used["files"]) else "versions of the table"
    if third.startswith("manifest-"):
        return None if used and key == paths.manifest_key(run_id, used["manifest"]) else "manifests"
    return "leases" if third.startswith("driver.claim-") else None


def _is_older(info: ObjectInfo, before: float) -> bool:
    return info.modified is not None and info.modified < before


def _spare(run_id: str, holder: str | None) -> None:
    logger.warning("run %s is left alone: %s works on it", run_id, holder or "another process")
