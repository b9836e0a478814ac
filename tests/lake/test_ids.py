"""Tests that an id is found if, and only if, it is in the set."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.lake.ids import Ids, IdSet


def ids_of(values: list[bytes]) -> Ids:
    return np.frombuffer(b"".join(values), "S16").copy()


@pytest.mark.parametrize("count", [0, 1, 2, 7, 300, 20_000])
def test_a_set_agrees_with_python_s(count: int) -> None:
    random = np.random.default_rng(count)
    known = [random.bytes(16) for _ in range(count)] + [bytes(16), b"\xff" * 16] * (count > 1)
    asked = [*known[::3], *(random.bytes(16) for _ in range(100)), bytes(16), b"\xff" * 16, b"\0" * 15 + b"\1"]
    found = IdSet(ids_of([*known, *known[:5]])).contains(ids_of(asked))
    members = set(known)
    assert found.tolist() == [value in members for value in asked]


def test_bytes_that_end_in_zeros_are_not_taken_for_shorter_ones() -> None:
    known = [b"\1" + bytes(15), bytes(8) + b"\2" + bytes(7)]
    asked = [*known, b"\1" * 2 + bytes(14), bytes(16), bytes(8) + b"\2" + bytes(6) + b"\1"]
    assert IdSet(ids_of(known)).contains(ids_of(asked)).tolist() == [True, True, False, False, False]
