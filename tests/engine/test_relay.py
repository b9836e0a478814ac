"""Tests that warnings of actors reach the driver's log."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator

import pytest

from pipeline.engine.relay import WarningKeeper, unpack


@pytest.fixture
def keeper() -> Iterator[WarningKeeper]:
    keeper = WarningKeeper()
    yield keeper
    logging.getLogger("pipeline").removeHandler(keeper)


def test_warnings_travel_once_with_the_next_reply(keeper: WarningKeeper, caplog: pytest.LogCaptureFixture) -> None:
    storage = logging.getLogger("pipeline.storage.bucket")
    storage.warning("bucket %s: %d", "photos", 503)
    storage.info("of no interest to the driver")
    logging.getLogger("urllib3").warning("of no interest to anyone")
    first, second = keeper.reply(7), keeper.reply(8)
    logging.getLogger("pipeline").removeHandler(keeper)
    caplog.clear()
    assert (unpack(first), unpack(second)) == (7, 8)
    assert caplog.record_tuples == [
        ("pipeline.storage.bucket", logging.WARNING, f"worker on {socket.gethostname()}: bucket photos: 503")
    ]


def test_of_too_many_warnings_the_latest_travel_and_all_are_printed(
    keeper: WarningKeeper, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(250):
        logging.getLogger("pipeline").error("fault %d", number)
    assert [warned.message for warned in keeper.reply(None).warnings] == [
        f"fault {number}" for number in range(150, 250)
    ]
    assert len(capsys.readouterr().err.splitlines()) == 250
