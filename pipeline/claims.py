"""Claims: who may do a thing that is to be done once, across processes, machines and nights.

A claim is an object created create-only, with an owner and a lease. Claims on the same thing are numbered: once claim n
is released or its lease has run out, contenders create n + 1, and the store lets one of them. So no claim is ever taken
from its holder by deleting it, and two never hold one.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.storage import Store

_LONGEST_PAUSE_S = 2.0


@dataclass(frozen=True)
class Claim:
    """A claim that this process holds. Clocks of contenders may differ by less than the lease's spare time."""

    store: Store
    key: str
    owner: str

    def renew(self, seconds: float) -> None:
        """Holds it for so many seconds from now."""
        self.store.write(self.key, _encode(self.owner, time.time() + seconds))

    def release(self) -> None:
        """Lets the next contender in at once."""
        self.renew(0.0)


def acquire(
    store: Store,
    name: str,
    owner: str,
    seconds: float,
    is_done: Callable[[], bool],
    pause: Callable[[float], None] = time.sleep,
) -> Claim | None:
    """Waits until this process holds the claim `name`, or until is_done() says that another has done the work (None).

    name: a key without suffix; claims lie at <name>.claim-<n>.json. seconds: the first lease.
    """
    number, wait = 1, 0.05
    while not is_done():
        key = claim_key(name, number)
        if store.create(key, _encode(owner, time.time() + seconds)):
            if not is_done():
                return Claim(store, key, owner)
            store.delete(key)
            return None
        holder = _read(store, key)
        if holder is None or holder["expires_at"] <= time.time():
            number += 1
            continue
        pause(wait * random.uniform(0.5, 1.0))
        wait = min(2 * wait, _LONGEST_PAUSE_S)
    return None


def clear(store: Store, name: str) -> None:
    """Removes the claims of work that is done."""
    folder = name.rpartition("/")[0]
    for info in list(store.list(folder)):
        if info.key.startswith(f"{name}.claim-"):
            store.delete(info.key)


def claim_key(name: str, number: int) -> str:
    """Where claim `number` (from 1) on a thing lies."""
    return f"{name}.claim-{number:04}.json"


def _encode(owner: str, expires_at: float) -> bytes:
    return json.dumps({"owner": owner, "expires_at": expires_at}).encode()


def _read(store: Store, key: str) -> dict[str, Any] | None:
    """The claim; None where it was cleared since, because the work is done."""
    try:
        claim: dict[str, Any] = json.loads(store.read(key))
    except FileNotFoundError:
        return None
    return claim
