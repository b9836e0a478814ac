"""Finds and removes files that no commit refers to, by streamed listings, and only while no driver works on their run.

Only files of known kinds are removed. Other files in the output are kept, and so are prompts, the table, commits and
the records of runs (job.yaml, stats.json, the report), unless the rows of old nights are to be removed too.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from itertools import chain, groupby

from pipeline.lake.commits import published_nights, read_commit
from pipeline.lake.iceberg import retract_night
from pipeline.lake.ledger import find_ledger
from pipeline.storage import ObjectInfo, Store, leases, paths
from schemas.records import Commit, dump_record

logger = logging.getLogger(__name__)

_RUN_ID = re.compile(r"\d{4}-\d\d-\d\d-[0-9a-f]+")
_NIGHT = re.compile(r"\d{4}-\d\d-\d\d")


@dataclass(frozen=True)
class Garbage:
    """A file that nothing refers to. size: bytes."""

    kind: str
    key: str
    size: int


@dataclass(frozen=True)
class Retention:
    """Which nights are old, and what of them is removed.

    oldest_kept: nights before this date are old. table: remove old nights entirely. Otherwise only their masks, maps,
    shards, manifests and reference patches are removed, which their commits then say; rows and records stay.
    """

    oldest_kept: date
    table: bool = False


def find_oldest_kept(
    output: Store, *, keep_nights: int | None = None, keep_days: int | None = None, today: date
) -> date | None:
    """Returns the first of the last `keep_nights` published nights, or of the last `keep_days` days.

    The last published night is always kept. None if no published night is older.
    """
    nights = [date.fromisoformat(night) for night in published_nights(output)]
    if not nights:
        return None
    if keep_nights is not None:
        oldest = nights[-keep_nights:][0]
    elif keep_days is not None:
        oldest = min(today - timedelta(days=keep_days - 1), nights[-1])
    else:
        return None
    return oldest if nights[0] < oldest else None


def collect_garbage(
    output: Store, older_than_s: float, *, delete: bool, retention: Retention | None = None
) -> Iterator[Garbage]:
    """Yields the files that no commit refers to and that were last written more than older_than_s seconds ago.

    A run whose driver is alive is left alone. Before files of a run are removed, its driver's lease is taken and the
    commit read again. So a driver that starts meanwhile waits, and then finds each file whole or gone.
    If this process is killed, the next one removes the rest.

    delete: remove each file before it is yielded. retention: also yield files of old nights whose commits were written
    more than older_than_s seconds ago. Raises LakeError or CatalogError where old nights must be removed from an
    Iceberg catalog that cannot be reached.
    """
    collector = _Collector(output, time.time() - older_than_s, delete, retention)
    yield from collector.retire()
    yield from collector.sweep()


class _Collector:
    """Walks over all files of an output once. before: Unix time; files that were written later are left alone."""

    def __init__(self, output: Store, before: float, delete: bool, retention: Retention | None) -> None:
        self.output = output
        self.before = before
        self.delete = delete
        self.oldest_kept = "" if retention is None else str(retention.oldest_kept)
        self.removes_old = retention is not None and retention.table
        self.old = self._find_old()

    def _find_old(self) -> frozenset[str]:
        """Finds the old nights. If their table is removed, also those that an earlier removal has left incomplete."""
        if not self.oldest_kept:
            return frozenset()
        nights = {_night_of(info): info for info in self.output.list("commits")}
        left = {info.key.split("/")[1].removeprefix("run_date=") for info in self.output.list(paths.TABLE)}
        return frozenset(
            night
            for night in nights.keys() | (left if self.removes_old else set())
            if _NIGHT.fullmatch(night)
            and night < self.oldest_kept
            and (night not in nights or self._is_older(nights[night]))
        )

    def retire(self) -> Iterator[Garbage]:
        """Marks the commits of old nights as cleared, or removes the commits and rows of these nights."""
        for night in sorted(self.old):
            commit = read_commit(self.output, night)
            if commit is not None:
                if not self.removes_old and commit.cleared_at:
                    continue
                if holder := leases.holder(self.output, paths.driver_lease(commit.run_id)):
                    _warn_in_use(commit.run_id, holder)
                    continue
            name = paths.night_lease(date.fromisoformat(night))
            if not self.delete:
                if self.removes_old and leases.holder(self.output, name) is None:
                    yield from self._table_of(night)
            elif lease := leases.try_acquire(self.output, name, leases.new_owner(), leases.LEASE_S):
                with lease.held(leases.LEASE_S, discard=True):
                    if self.removes_old:
                        yield from self._remove_table(night, lease)
                    else:
                        self._clear(night, lease)
                    yield from _predecessors(lease)

    def _clear(self, night: str, lease: leases.Lease) -> None:
        version = self.output.version(paths.commit_key(night))
        commit = read_commit(self.output, night)
        if commit is None:
            return
        lease.check()
        self.output.replace(paths.commit_key(night), dump_record(_cleared(commit)), version)

    def _remove_table(self, night: str, lease: leases.Lease) -> Iterator[Garbage]:
        if commit := read_commit(self.output, night):
            retract_night(self.output, commit.run_id, lease)
        for item in self._table_of(night):
            lease.check()
            self.output.delete(item.key)
            yield item

    def _table_of(self, night: str) -> Iterator[Garbage]:
        """Yields the commit and then the files of a night. Without its commit, a night is no longer published."""
        key = paths.commit_key(night)
        if self.output.exists(key):
            yield Garbage("commits", key, self.output.info(key).size or 0)
        for info in list(self.output.list(f"{paths.TABLE}/run_date={night}")):
            if self._is_older(info):
                yield Garbage("table", info.key, info.size or 0)

    def sweep(self) -> Iterator[Garbage]:
        """Yields the files that no commit refers to."""
        for name, infos in groupby(self.output.list("runs"), lambda info: info.key.split("/")[1]):
            if _RUN_ID.fullmatch(name):
                yield from self._sweep_run(name, infos)
            elif name.partition(".claim-")[1]:
                yield from self._sweep_leases(f"runs/{name.partition('.claim-')[0]}", infos)
        for kind in ("masks", "maps"):
            for (night, version), infos in groupby(
                self.output.list(kind), lambda info: tuple(info.key.split("/")[1:3])
            ):
                run_id = f"{night.removeprefix('run_date=')}-{version.partition('-')[0]}"
                if _RUN_ID.fullmatch(run_id):
                    yield from self._sweep_run(run_id, infos)
        for night, infos in groupby(self.output.list(paths.LEDGER), lambda info: info.key.split("/")[1]):
            if _NIGHT.fullmatch(night):
                yield from self._sweep_ledgers(night, infos)
        for info in self.output.leftovers():
            if self._is_older(info):
                if self.delete:
                    self.output.delete(info.key)
                yield Garbage("unfinished writes", info.key, info.size or 0)

    def _commit_of(self, night: str) -> Commit | None:
        """Reads the commit of a night. If nothing is removed, returns it as it would be after a removal."""
        commit = read_commit(self.output, night)
        if commit is None or self.delete or night not in self.old:
            return commit
        return None if self.removes_old else _cleared(commit)

    def _sweep_run(self, run_id: str, infos: Iterable[ObjectInfo]) -> Iterator[Garbage]:
        commit, whole_night = self._commit_of(run_id[:10]), self.removes_old and run_id[:10] < self.oldest_kept
        found = (
            Garbage(kind, info.key, info.size or 0)
            for info in infos
            if self._is_older(info) and (kind := _kind(info.key, run_id, commit, whole_night))
        )
        first = next(found, None)
        if first is None:
            return
        name = paths.driver_lease(run_id)
        if not self.delete:
            if (holder := leases.holder(self.output, name)) is not None:
                _warn_in_use(run_id, holder)
            else:
                yield from chain([first], found)
            return
        lease = leases.try_acquire(self.output, name, leases.new_owner(), leases.LEASE_S)
        if lease is None:
            _warn_in_use(run_id, leases.holder(self.output, name))
            return
        with lease.held(leases.LEASE_S, discard=True):
            commit = self._commit_of(run_id[:10])
            for item in chain([first], found):
                lease.check()
                if item.kind != "leases" and _kind(item.key, run_id, commit, whole_night):
                    self.output.delete(item.key)
                    yield item
            yield from _predecessors(lease)

    def _sweep_ledgers(self, night: str, infos: Iterable[ObjectInfo]) -> Iterator[Garbage]:
        """Yields ledgers whose commits were replaced, removed or never written, unless the night is being published."""
        old = [info for info in infos if self._is_older(info)]
        name = paths.night_lease(date.fromisoformat(night))

        def find() -> list[Garbage]:
            ledger = None if self._commit_of(night) is None else find_ledger(self.output, night)
            kept = None if ledger is None else ledger.key
            return [Garbage("ledgers", info.key, info.size or 0) for info in old if info.key != kept]

        if not find():
            return
        if not self.delete:
            yield from find() if leases.holder(self.output, name) is None else ()
        elif lease := leases.try_acquire(self.output, name, leases.new_owner(), leases.LEASE_S):
            with lease.held(leases.LEASE_S):
                for item in find():
                    lease.check()
                    self.output.delete(item.key)
                    yield item

    def _sweep_leases(self, name: str, infos: Iterable[ObjectInfo]) -> Iterator[Garbage]:
        found = [Garbage("leases", info.key, info.size or 0) for info in infos if self._is_older(info)]
        if not found:
            return
        if not self.delete:
            yield from found if leases.holder(self.output, name) is None else ()
        elif lease := leases.try_acquire(self.output, name, leases.new_owner(), leases.LEASE_S):
            with lease.held(leases.LEASE_S, discard=True):
                yield from _predecessors(lease)

    def _is_older(self, info: ObjectInfo) -> bool:
        return info.modified is not None and info.modified < self.before


def _predecessors(lease: leases.Lease) -> Iterator[Garbage]:
    return (Garbage("leases", key, lease.store.info(key).size or 0) for key in lease.keys[:-1])


def _kind(key: str, run_id: str, commit: Commit | None, whole_night: bool) -> str | None:
    """Returns the kind of a run's file that nothing refers to; None for a file that must be kept.

    whole_night: the run's night is removed entirely, so that its records are removed with its commit.
    """
    top, second, third = (*key.split("/", 3), "", "")[:3]
    used = commit if commit is not None and commit.run_id == run_id else None
    whole = None if used is None or used.cleared_at else used
    # Commits of early versions do not name the folder of their shards, so all folders of the run are kept.
    folder = None if whole is None else whole.shards
    if top in ("masks", "maps"):
        digest = (folder or "").partition("/masked-")[2]
        kept = whole and (folder is None or third == paths.mask_version(run_id, digest or None))
        return None if kept else top
    if third == "shards":
        return None if whole else "shards"
    if third.startswith("masked-"):
        kept = whole and (folder is None or folder == f"{top}/{second}/{third}")
        return None if kept else "shards with masks"
    if third.startswith("table-"):
        return None if used and any(key == entry.key for entry in used.files) else "versions of the table"
    if third.startswith("manifest-"):
        return None if whole and key == paths.manifest_key(run_id, whole.manifest) else "manifests"
    if third == "memory":
        return None if whole else "reference patches"
    if third.startswith("driver.claim-"):
        return "leases"
    return "records" if whole_night and commit is None else None


def _night_of(info: ObjectInfo) -> str:
    return info.key.removeprefix("commits/").removesuffix(".json")


def _cleared(commit: Commit) -> Commit:
    return commit.model_copy(update={"cleared_at": datetime.now(timezone.utc)})


def _warn_in_use(run_id: str, holder: str | None) -> None:
    logger.warning("run %s is skipped, because %s works on it", run_id, holder or "another process")
