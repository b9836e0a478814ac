"""Tests that a log only has alfa's own lines and real warnings when something fails; test_score.py covers the rest."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import COMMAND, alfa_alone, lines_of_others
from tests.llm_server import HANG, LLMServer, Reply
from tests.places import DEMO

REFUSED: Reply = (401, {}, '{"error": {"message": "no such key"}}')
RESUME = "alfa: run the same command again to resume; nothing that has finished is done twice"


@pytest.mark.slow
def test_a_prompt_that_cannot_be_made_while_others_are_asked_for_is_one_clear_line(tmp_path: Path) -> None:
    for name in ("nut", "bolt", "screw"):
        shutil.copytree(DEMO / "hazelnut" / "test" / "good", tmp_path / "in" / name)
    with LLMServer([REFUSED, HANG, HANG]) as server:
        arguments = ["--images", tmp_path / "in", "--output", tmp_path / "out", "--llm", "openai/test"]
        base = f"prompts.api_base={server.api_base}"
        failed = alfa_alone("score", *arguments, "--set", base, OPENAI_API_KEY="sk-test")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert lines_of_others(failed.stderr) == []
    refusal, resume = [line for line in failed.stderr.splitlines() if line.startswith("alfa: ")]
    assert "openai/test refuses the API key" in refusal
    assert resume == RESUME


@pytest.mark.slow
def test_a_night_that_its_cluster_stops_says_that_it_was_interrupted(tmp_path: Path) -> None:
    arguments = ["score", "--images", str(DEMO), "--output", str(tmp_path), "--set", "engine.shard_size=1"]
    job = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("runs/*/shards/*.arrow")):
        assert job.poll() is None
    job.terminate()
    _, log = job.communicate(timeout=60)
    assert job.returncode == 130
    assert lines_of_others(log) == []
    assert log.splitlines()[-1] == "alfa: stopped; finished shards are kept. Run the same command again to resume"
    (stats,) = tmp_path.glob("runs/*/stats.json")
    assert json.loads(stats.read_text())["state"] == "interrupted"


_IMPATIENT = "import time; time.sleep = lambda seconds: None; from jobs.cli import main; main()"
"""`alfa`, but what libraries wait between their retries it does not."""


def test_weights_that_cannot_be_downloaded_are_one_clear_line(tmp_path: Path) -> None:
    arguments = ["score", "--images", DEMO, "--output", tmp_path, "--model", "ViT-B-16/laion400m_e32"]
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-c", _IMPATIENT, *map(str, arguments)]
    failed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert failed.returncode == 2
    assert lines_of_others(failed.stderr) == []
    assert "WARNING" not in failed.stderr
    (refusal,) = [line for line in failed.stderr.splitlines() if line.startswith("alfa: ")]
    assert "the weights ViT-B-16/laion400m_e32 could not be downloaded" in refusal


@pytest.mark.slow
def test_what_a_worker_warns_of_is_in_the_log_and_its_death_is_one_line(tmp_path: Path) -> None:
    """An LLM that fails is an error of the prompt actor's, with which the night goes on; a worker is killed too."""
    shutil.copytree(DEMO / "hazelnut" / "test" / "good", tmp_path / "in" / "nut")
    options = ["prompts.on_failure=base", "engine.shard_size=1", "engine.actors=1"]
    with LLMServer([REFUSED]) as server:
        options.append(f"prompts.api_base={server.api_base}")
        sets = [part for option in options for part in ("--set", option)]
        where = ["--images", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--llm", "openai/test"]
        command = [sys.executable, "-m", "tests.killed_driver", "workers:2", "score", *where, *sets]
        environment = {**os.environ, "OPENAI_API_KEY": "sk-test"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert lines_of_others(done.stderr) == []
    errors, warnings = ([line for line in done.stderr.splitlines() if level in line] for level in (" ERROR ", " WARN"))
    assert len(errors) == 1 and re.search(r"worker on \S+: .*refuses the API key.*base ensemble", errors[0])
    assert [line for line in warnings if "a scoring worker died and is replaced" in line] == warnings != []
    assert "raylet" not in done.stdout
