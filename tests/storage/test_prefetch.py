import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.storage import map_ahead


def test_results_come_in_order_and_no_more_are_under_way_than_allowed() -> None:
    results: list[int] = []
    under_way: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            under_way.append(number + 1 - len(results))
            yield number

    with ThreadPoolExecutor(4) as pool:
        for result in map_ahead(pool, lambda number: number * number, items(), ahead=8):
            results.append(result)
    assert results == [number * number for number in range(50)]
    assert max(under_way) == 8


def test_calls_overlap() -> None:
    together = threading.Barrier(4, timeout=30)
    with ThreadPoolExecutor(4) as pool:
        assert len(list(map_ahead(pool, lambda _: together.wait(), range(8), ahead=4))) == 8


def test_a_failure_reaches_the_consumer() -> None:
    with ThreadPoolExecutor(2) as pool, pytest.raises(ZeroDivisionError):
        list(map_ahead(pool, lambda number: 1 // number, [2, 1, 0, 1], ahead=2))
