"""Tests the command line as users see it: help, version, completion, terminals, pipes and JSON."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import date, datetime, timedelta, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import typer
import yaml
from typer.testing import CliRunner

from jobs import cli
from jobs.cli import app
from jobs.status import read_status
from pipeline.evaluation import PUBLISHED
from pipeline.lake import DIALECTS, FORMATS
from pipeline.storage import Store, paths
from schemas.job import parse_job
from schemas.records import Commit, dump_record
from tests.command import COMMAND, alfa, alfa_alone
from tests.places import ROOT

RUN_ID = f"2026-01-02-{'a' * 12}"
PANELS = {
    "Run a night": {"demo", "check", "plan", "prompts", "score", "backfill", "submit"},
    "Look at it": {"status", "report", "diff", "export"},
    "Tune it": {"evaluate", "calibrate"},
    "Keep house": {"gc", "ledger", "schema"},
}
COMMANDS = sorted(set.union(*PANELS.values()))


def write_stats(output: Path, run_id: str = RUN_ID, **facts: Any) -> None:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    stats = {
        "run_id": run_id,
        "state": "running",
        "shards": 3,
        "images": 600,
        "errors": {"corrupt": 2},
        "anomalies": {"nut": 4, "bolt": 1},
        "images_per_second": 2.5,
        "updated_at": now,
        **facts,
    }
    path = output / paths.run_key(run_id, "stats.json")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(stats))


def on_a_terminal(*arguments: str | Path, **environment: str) -> str:
    """What `alfa` prints to stdout and stderr where both are a terminal of 80 columns."""
    master, slave = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    command = [*COMMAND, *map(str, arguments)]
    environment = {**inherited, "TERM": "xterm-256color", **environment}
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    printed = b"".join(_read_all(master)).decode()
    process.wait()
    return printed


def _read_all(master: int) -> Iterator[bytes]:
    try:
        while chunk := os.read(master, 65536):
            yield chunk
    except OSError:  # how a terminal says that its last writer has gone
        os.close(master)


def test_the_version_is_that_of_the_package_also_by_python_m() -> None:
    version = f"alfa {metadata.version('alfa-pipeline')}\n"
    assert alfa_alone("--version").stdout == version
    by_module = subprocess.run([sys.executable, "-m", "jobs", "--version"], capture_output=True, text=True)
    assert by_module.stdout == version


def test_help_groups_the_commands_and_names_completion_and_exit_codes() -> None:
    shown = alfa("--help").stdout
    found = {
        title.strip(): set(re.findall(r"^│ ([a-z]+) ", body, re.MULTILINE))
        for title, body in re.findall(r"^╭─ ([^─]+) ─+╮\n(.*?)^╰", shown, re.MULTILINE | re.DOTALL)
    }
    assert {title: found[title] for title in PANELS} == PANELS
    for words in ("alfa --install-completion", "--version", "alfa score job.yaml", "130 interrupted"):
        assert words in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_shows_an_example_that_can_be_parsed(command: str) -> None:
    epilog = typer.main.get_command(app).commands[command].epilog
    examples = re.findall(r"alfa ([a-z]+)((?: [^ ;>]+)*)", epilog)
    assert examples and {name for name, _ in examples} == {command}
    for _, arguments in examples:
        typer.main.get_command(app).commands[command].make_context("alfa", arguments.split())


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"demo", "schema"}))
def test_commands_that_open_a_store_take_an_endpoint(command: str) -> None:
    flags = {flag for option in typer.main.get_command(app).commands[command].params for flag in option.opts}
    assert "--endpoint" in flags


def test_the_choices_of_flags_are_those_of_the_pipeline() -> None:
    assert set(get_args(cli.Dialect)) == set(DIALECTS)
    assert set(get_args(cli.ExportFormat)) == set(FORMATS)
    assert set(get_args(cli.Benchmark)) == set(PUBLISHED)
    refused = alfa("export", "out", "2026-01-02", "--to", "excel")
    assert refused.returncode == 2
    assert all(name in refused.stderr for name in FORMATS)


@pytest.mark.parametrize(("typed", "offered"), [("alfa cal", {"calibrate"}), ("alfa schema --dialect d", {"duckdb"})])
def test_the_shell_completes_commands_and_choices(typed: str, offered: set[str]) -> None:
    words = {"_ALFA_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    assert set(alfa_alone(**words).stdout.split()) == offered


def test_a_pipe_gets_whole_cells_on_one_line_and_no_escape_codes(tmp_path: Path) -> None:
    errors = {f"an_error_type_with_a_long_name_{number}": number for number in range(1, 9)}
    write_stats(tmp_path, errors=errors)
    environment = {"COLUMNS": "40", "TERM": "xterm-256color"}
    shown = alfa_alone("status", tmp_path, **environment)
    (row,) = [line for line in shown.stdout.splitlines() if RUN_ID in line]
    assert ", ".join(f"{count} {name}" for name, count in errors.items()) in row
    assert "…" not in shown.stdout
    refused = alfa_alone("status", "s4://lake", **environment)
    assert "\x1b" not in shown.stdout + shown.stderr + refused.stderr


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_in_a_pipe_is_plain_and_whole(command: tuple[str, ...]) -> None:
    # 80 columns are what a pipe counts as.
    shown = CliRunner(env={"COLUMNS": "80", "TERM": "xterm-256color"}).invoke(app, [*command, "--help"])
    assert shown.exit_code == 0
    assert "…" not in shown.output
    assert "\x1b" not in shown.output


def test_a_narrow_terminal_folds_cells_and_has_colours_unless_there_are_to_be_none(tmp_path: Path) -> None:
    write_stats(tmp_path)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", on_a_terminal("status", tmp_path))
    assert RUN_ID in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    red = "\x1b[31m"
    assert red in on_a_terminal("status", "s4://lake")
    assert red not in on_a_terminal("status", "s4://lake", NO_COLOR="1")


def test_status_as_json_is_all_of_stdout(tmp_path: Path) -> None:
    longer_ago = (datetime.now(timezone.utc) - timedelta(minutes=11)).isoformat(timespec="seconds")
    older = f"2026-01-01-{'b' * 12}"
    write_stats(tmp_path, scoring_images_per_second=7.5)
    write_stats(tmp_path, older, updated_at=longer_ago)
    day, now = date(2026, 1, 2), datetime.now(timezone.utc)
    commit = Commit(run_date=day, run_id=RUN_ID, manifest="m", rows=0, committed_at=now, files=())
    Store(str(tmp_path)).write(paths.commit_key(day), dump_record(commit))
    shown = alfa("status", tmp_path, "--json")
    assert shown.returncode == 0
    document = json.loads(shown.stdout)
    assert document["output"] == str(tmp_path)
    first, second = document["runs"]
    assert (first["run_id"], first["state"], first["published"], first["silent_s"]) == (RUN_ID, "running", True, None)
    assert (first["shards"], first["finished_shards"], first["images"]) == (3, 0, 600)
    assert first["errors"] == {"corrupt": 2}
    assert first["anomalies"] == {"nut": 4, "bolt": 1}
    assert (first["images_per_second"], second["images_per_second"]) == (7.5, 2.5)
    assert (second["run_id"], second["published"]) == (older, False)
    assert second["silent_s"] >= 660
    assert json.loads(alfa("status", tmp_path / "nothing", "--json").stdout)["runs"] == []


def test_a_run_whose_driver_is_silent_is_said_to_be_so(tmp_path: Path) -> None:
    longer_ago = (datetime.now(timezone.utc) - timedelta(minutes=11)).isoformat(timespec="seconds")
    write_stats(tmp_path, updated_at=longer_ago)
    assert "no sign of life for 11 min; run the same command again to resume" in alfa("status", tmp_path).stdout
    write_stats(tmp_path, f"2026-01-03-{'c' * 12}", state="failed", updated_at=longer_ago)
    assert [run.silent_s is None for run in read_status(Store(str(tmp_path)))] == [True, False]


def read_job_schema() -> dict[str, Any]:
    shown = alfa("schema", "--job")
    assert shown.returncode == 0
    document: dict[str, Any] = json.loads(shown.stdout)
    return document


def test_the_schema_of_jobs_accepts_what_alfa_accepts_and_refuses_what_it_refuses() -> None:
    schema = read_job_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    demo = yaml.safe_load((ROOT / "infra" / "demo" / "job.yaml").read_text())
    validator.validate(demo)
    resolved = parse_job(demo, ["engine.actors=4", "references.images=train", "method.tile.size=400"])
    validator.validate(resolved.model_dump(mode="json"))
    for wrong in (
        {**demo, "outptu": demo["output"]},
        {**demo, "threshold": {"policy": "guess"}},
        {**demo, "threshold": {"quantile": 1.5}},
        {"dataset": demo["dataset"]},
    ):
        assert not validator.is_valid(wrong), wrong


def test_the_schema_of_jobs_describes_keys_to_editors() -> None:
    schema = read_job_schema()
    images = schema["$defs"]["Dataset"]["properties"]["images"]
    assert images["description"] == "folder, table file or URI of the images; {run_date} in it is the night's date"
    assert "$schema=job.schema.json" in alfa("schema", "--help").stdout


@pytest.mark.parametrize("arguments", [[], ["--job", "--dialect", "duckdb"]])
def test_a_schema_is_of_one_thing(arguments: list[str]) -> None:
    refused = alfa("schema", *arguments)
    assert (refused.returncode, refused.stderr) == (2, "alfa: schema needs either --dialect or --job\n")
