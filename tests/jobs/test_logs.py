"""Tests the log in both formats."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.command import alfa

SECRET = "wJalrXUtnFEMI-K7MDENG"

_LOG = """
import logging, os
from jobs import logs
logs.configure(logs.LogFormat(os.environ["FORMAT"]))
logs.bind(run_id="2026-01-02-abc")
logger = logging.getLogger("pipeline.storage")
logger.info("listing %s", "s3://user:pass@host/a")
logging.getLogger("botocore").info("not ours: not shown")
try:
    raise OSError(f"denied to {os.environ['AWS_SECRET_ACCESS_KEY']}")
except OSError:
    logger.exception("the key was\\n%s", os.environ["AWS_SECRET_ACCESS_KEY"])
"""


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_secrets_are_blanked_in_messages_arguments_and_tracebacks(log_format: str) -> None:
    environment = {**os.environ, "FORMAT": log_format, "AWS_SECRET_ACCESS_KEY": SECRET}
    done = subprocess.run([sys.executable, "-c", _LOG], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == ""
    assert SECRET not in done.stderr and "pass@" not in done.stderr and "not ours" not in done.stderr
    assert "s3://***@host/a" in done.stderr and "OSError: denied to ***" in done.stderr
    if log_format == "text":
        assert "INFO listing" in done.stderr and "Traceback" in done.stderr
        return
    listing, failure = (json.loads(line) for line in done.stderr.splitlines())
    assert listing["level"] == "INFO" and listing["logger"] == "pipeline.storage" and "exception" not in listing
    assert listing["time"].endswith("+00:00") and listing["run_id"] == failure["run_id"] == "2026-01-02-abc"
    assert failure["message"] == "the key was\n***" and "denied to ***" in failure["exception"]


def test_a_refusal_is_a_json_line_too() -> None:
    refused = alfa("--log-format", "json", "score", "--images", "/no/such/folder", "--output", "x")
    assert refused.returncode == 2
    assert "no images at /no/such/folder" in json.loads(refused.stderr.splitlines()[-1])["message"]
