import json
import threading
import time
from pathlib import Path

import pytest

from pipeline.storage import Store, leases

LEASE_S = 0.4


def take(store: Store, owner: str, seconds: float = LEASE_S) -> leases.Lease:
    lease = leases.acquire(store, "work", owner, seconds)
    assert lease is not None
    return lease


def test_one_holder_at_a_time_among_many(tmp_path: Path) -> None:
    inside, most, done = [0], [0], []
    lock = threading.Lock()

    def work(number: int) -> None:
        with take(Store(str(tmp_path)), str(number), 30.0).held(30.0):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            done.append(number)
            with lock:
                inside[0] -= 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and sorted(done) == list(range(8))


def test_the_heartbeat_keeps_a_claim_beyond_its_lease(tmp_path: Path) -> None:
    store, entered = Store(str(tmp_path)), threading.Event()
    with take(store, "first").held(LEASE_S):
        waiter = threading.Thread(target=lambda: take(store, "second") and entered.set())
        waiter.start()
        assert not entered.wait(3 * LEASE_S)
    assert entered.wait(10)
    waiter.join()


def test_who_was_silent_too_long_learns_it_and_leaves_the_successor_alone(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first = take(store, "first", 0.0)
    second = take(store, "second", 30.0)
    with pytest.raises(leases.LeaseLostError, match="second took over"):
        first.check()
    with pytest.raises(leases.LeaseLostError), first.held(30.0):
        first.check()
    second.check()
    holder = json.loads(store.read(leases.lease_key("work", 2)))
    assert holder["owner"] == "second" and holder["expires_at"] > time.time()


def test_the_waiting_are_told_for_whom(tmp_path: Path) -> None:
    store, told = Store(str(tmp_path)), []
    with take(store, "first", 30.0).held(30.0):
        assert leases.acquire(store, "work", "second", 1.0, lambda: bool(told), told.append) is None
    assert told == ["first"]


def test_a_contender_that_read_a_claim_which_was_discarded_since_begins_anew(tmp_path: Path) -> None:
    store, holders = Store(str(tmp_path)), []
    with take(store, "long ago", 30.0).held(30.0):
        pass

    class Late(Store):
        """Between its reading lease 1 and creating lease 2, all are discarded, and another takes the first."""

        def create(self, key: str, data: bytes) -> bool:
            if key == leases.lease_key("work", 2) and not holders:
                with take(store, "collector", 30.0).held(30.0, discard=True):
                    pass
                holders.append(take(store, "first", 30.0))
            return super().create(key, data)

    assert leases.try_acquire(Late(str(tmp_path)), "work", "second", 30.0) is None
    assert [holder.number for holder in holders] == [1] and leases.holder(store, "work") == "first"
    holders[0].check()
