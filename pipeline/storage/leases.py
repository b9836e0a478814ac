"""Leases: which process may do a piece of work that is to be done once, across processes, machines and nights.

A lease is an object in the store, created create-only, with its owner and the time at which it ends. The leases of a
piece of work are numbered: once lease n was released or has ended, contenders create lease n + 1, and the store lets
one of them. So nobody takes a lease from its holder by deleting it, and two processes never hold the same one. A holder
that was cut off for longer than its lease learns so from check().
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.storage.store import Store

logger = logging.getLogger(__name__)

LEASE_S = 30.0
"""Default lease in seconds: so long a lease outlives a holder that died. Clocks must differ by less."""

_BEATS_PER_LEASE = 4
_LONGEST_PAUSE_S = 2.0


class LeaseLostError(RuntimeError):
    """This process was silent for longer than its lease, and another has taken its work over."""


@dataclass(frozen=True)
class Lease:
    """A lease that this process holds."""

    store: Store
    name: str
    number: int
    owner: str

    def renew(self, seconds: float) -> None:
        """Extends the lease to `seconds` from now. Raises LeaseLostError where another process has taken it over."""
        self.check()
        self.store.write(lease_key(self.name, self.number), _encode(self.owner, time.time() + seconds))

    def check(self) -> None:
        """Raises LeaseLostError where another process has taken the lease over, or has removed it as ended."""
        successor = _read(self.store, lease_key(self.name, self.number + 1))
        if successor is None and not self.store.exists(lease_key(self.name, self.number)):
            raise LeaseLostError(f"the lease {self.store.uri(self.name)} of this process ({self.owner}) was removed")
        if successor is not None:
            raise LeaseLostError(
                f"this process ({self.owner}) was silent for so long that {successor['owner']} took over "
                f"{self.store.uri(self.name)}; it goes on there, and this process stops"
            )

    @contextlib.contextmanager
    def held(self, seconds: float, *, discard: bool = False) -> Iterator[None]:
        """Renews it by a heartbeat for as long as the block runs, and lets the next contender in afterwards.

        discard: to that end removes this lease and the ones before it, lowest first; acquire is prepared for it.
        """
        over = threading.Event()

        def beat() -> None:
            while not over.wait(seconds / _BEATS_PER_LEASE):
                try:
                    self.renew(seconds)
                except LeaseLostError:
                    return  # the worker learns of it from check()
                except OSError as error:
                    logger.warning("the lease %s was not renewed, it is tried again: %s", self.name, error)

        heart = threading.Thread(target=beat, name="lease", daemon=True)
        heart.start()
        try:
            yield
        finally:
            over.set()
            heart.join()
            with contextlib.suppress(LeaseLostError):
                self.renew(seconds if discard else 0.0)
                for key in self.keys if discard else ():
                    self.store.delete(key)

    @property
    def keys(self) -> list[str]:
        """The keys of this lease and of the ones before it."""
        return [lease_key(self.name, number) for number in range(1, self.number + 1)]


def new_owner() -> str:
    """Names this process for the people who wait for it: user, host, process id, and a random part."""
    return f"{getpass.getuser()}@{socket.gethostname()}:{os.getpid()}-{uuid.uuid4().hex[:8]}"


def acquire(
    store: Store,
    name: str,
    owner: str,
    seconds: float,
    is_done: Callable[[], bool] = lambda: False,
    on_wait: Callable[[str], None] = lambda holder: None,
    pause: Callable[[float], None] = time.sleep,
) -> Lease | None:
    """Waits until this process holds the lease `name`, or until is_done() says that another has done the work (None).

    name: a key without suffix; leases lie at <name>.claim-<n>.json. seconds: the first lease. on_wait is told, once a
    holder, whom it waits for.
    """
    number, wait, waited_for = 1, 0.05, ""
    while not is_done():
        key = lease_key(name, number)
        if store.create(key, _encode(owner, time.time() + seconds)):
            if is_done():
                store.delete(key)
                return None
            if number == 1 or _is_over(_read(store, lease_key(name, number - 1))):
                return Lease(store, name, number, owner)
            # All leases were discarded since this process read the one before: there may be new ones.
            store.delete(key)
            number = 1
            continue
        holder = _read(store, key)
        if holder is None:
            continue  # cleared since, because the work is done
        if _is_over(holder):
            number += 1
            continue
        if holder["owner"] != waited_for:
            on_wait(waited_for := holder["owner"])
        pause(wait * random.uniform(0.5, 1.0))
        wait = min(2 * wait, _LONGEST_PAUSE_S)
    return None


def try_acquire(store: Store, name: str, owner: str, seconds: float) -> Lease | None:
    """Acquires the lease without waiting; None where another process holds it."""
    holders: list[str] = []
    return acquire(store, name, owner, seconds, lambda: bool(holders), holders.append, lambda _: None)


def holder(store: Store, name: str) -> str | None:
    """Names the owner that holds a lease now; None where nobody does."""
    number, last = 1, None
    while (lease := _read(store, lease_key(name, number))) is not None:
        number, last = number + 1, lease
    return None if last is None or _is_over(last) else last["owner"]


def clear(store: Store, name: str) -> None:
    """Removes all leases of work that is done for good; is_done must tell later processes so."""
    folder = name.rpartition("/")[0]
    for info in list(store.list(folder)):
        if info.key.startswith(f"{name}.claim-"):
            store.delete(info.key)


def lease_key(name: str, number: int) -> str:
    """Returns the key of lease `number` (from 1) of the piece of work `name`."""
    return f"{name}.claim-{number:04}.json"


def _encode(owner: str, expires_at: float) -> bytes:
    return json.dumps({"owner": owner, "expires_at": expires_at}).encode()


def _is_over(lease: dict[str, Any] | None) -> bool:
    return lease is not None and bool(lease["expires_at"] <= time.time())


def _read(store: Store, key: str) -> dict[str, Any] | None:
    try:
        lease: dict[str, Any] = json.loads(store.read(key))
    except FileNotFoundError:
        return None
    return lease
