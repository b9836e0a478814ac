"""When a scoring actor adds decoders. Times are given, in seconds."""

from __future__ import annotations

from pipeline.engine.growth import Growth


def look(growth: Growth, now: float, decoders: int, waited: float, images: int) -> int:
    growth.note(waited, images)
    return growth.more(now, 2, decoders)


def test_decoders_are_added_only_if_the_model_waits_for_more_than_a_tenth_of_the_time() -> None:
    growth = Growth(0)
    assert look(growth, 10, 0, 1.0, 100) == 0
    assert look(growth, 20, 0, 1.1, 100) == 1


def test_waits_of_several_batches_add_up_and_are_judged_once() -> None:
    growth = Growth(0)
    for _ in range(4):
        growth.note(0.5, 10)
    assert growth.more(10, 2, 0) == 1
    assert growth.more(20, 2, 0) == 0


def test_the_number_grows_by_half_as_long_as_the_rate_does() -> None:
    growth = Growth(0)
    assert look(growth, 10, 0, 9, 100) == 1
    assert look(growth, 20, 1, 9, 100) == 0  # their number has changed in this time
    assert look(growth, 30, 1, 9, 150) == 1
    assert look(growth, 40, 2, 9, 170) == 0
    assert look(growth, 50, 2, 9, 200) == 2
    assert look(growth, 60, 4, 9, 250) == 0
    assert look(growth, 70, 4, 9, 215) == 0  # 7 % more by twice as many: something else is too slow
    assert look(growth, 80, 4, 9, 400) == 3  # not any more


def test_decoders_that_died_are_replaced() -> None:
    growth = Growth(0)
    assert look(growth, 10, 0, 9, 100) == 1
    look(growth, 20, 4, 0, 300)
    assert look(growth, 30, 4, 9, 300) == 3
    look(growth, 40, 2, 9, 200)
    assert look(growth, 50, 2, 9, 200) == 2


def test_a_look_after_no_time_does_not_divide_by_zero() -> None:
    growth = Growth(0)
    assert look(growth, 0, 0, 1, 1) == 0
