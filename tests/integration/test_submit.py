"""A night as a job of a real Ray head that asks for a token."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.command import COMMAND, alfa_alone
from tests.fault_proxy import FaultProxy
from tests.nights import NIGHT
from tests.places import ROOT
from tests.processes import kill_processes
from tests.ray_head import Head, run_head

SECRET = "s3-secret-of-the-submitter"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with run_head() as head:
        yield head


def arguments(head: Head, output: Path, *more: str) -> list[str]:
    images = ROOT / "infra" / "demo" / "images"
    sets = ["--set", "engine.lease_s=1", "--set", "engine.shard_size=2", "--set", "engine.max_error_rate=1"]
    where = ["--images", str(images), "--output", str(output), "--run-date", NIGHT, "--address", head.address]
    return ["submit", *where, *sets, *more]


def start(head: Head, *command: str) -> subprocess.Popen[str]:
    """`alfa`, as a shell in the foreground starts it: who runs the tests may ignore Ctrl-C."""
    environment = {**os.environ, **head.environment, "AWS_SECRET_ACCESS_KEY": SECRET, "COLUMNS": "200"}
    return subprocess.Popen(
        [*COMMAND, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def rows(output: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in output.glob("scores/**/*.parquet"))


def jobs_of(head: Head, output: Path) -> dict[str, dict[str, object]]:
    return {name: job for name, job in head.jobs().items() if f"output.uri={output} " in job["entrypoint"] + " "}


def wait_for_end(head: Head, submission_id: str) -> None:
    while head.jobs()[submission_id]["status"] in ("PENDING", "RUNNING"):
        pass


@pytest.mark.slow
def test_a_night_submitted_twice_at_once_is_one_job_that_both_follow(head: Head, tmp_path: Path) -> None:
    submits = [start(head, *arguments(head, tmp_path)) for _ in range(2)]
    outcomes = [(*submit.communicate(timeout=240), submit.returncode) for submit in submits]
    assert [code for *_, code in outcomes] == [0, 0], outcomes
    assert all("24, 24 ok; errors: none" in out and out.count("layout mvtec") == 1 for out, *_ in outcomes)
    assert sorted("submitted as" in error for _, error, _ in outcomes) == [False, True]
    assert rows(tmp_path) == 24
    ((submission_id, job),) = jobs_of(head, tmp_path).items()
    assert submission_id.startswith(f"alfa-{NIGHT}-") and all(submission_id in out for out, *_ in outcomes)
    text = json.dumps(job)
    assert SECRET not in text and head.environment["RAY_AUTH_TOKEN"] not in text


@pytest.mark.slow
def test_without_its_token_the_head_is_named_and_nothing_runs(head: Head, tmp_path: Path) -> None:
    refused = alfa_alone(*arguments(head, tmp_path), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 32)
    assert refused.returncode == 1 and "set RAY_AUTH_MODE=token" in refused.stderr
    assert "Traceback" not in refused.stderr and not jobs_of(head, tmp_path)


@pytest.mark.slow
def test_the_code_is_sent_once_and_is_small(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    # The head of the other tests has the code already.
    with run_head() as head, FaultProxy(head.address, faults=()) as proxy:
        through = replace(head, address=proxy.endpoint)
        for night in ("first", "second"):
            command = [*arguments(through, tmp_path / night), "--images", str(tmp_path / "in"), "--no-wait"]
            done = alfa_alone(*command, **head.environment)
            assert done.returncode == 0 and "submitted as" in done.stderr, done.stderr
            (submission_id,) = jobs_of(head, tmp_path / night)
            wait_for_end(head, submission_id)
            # The job ran the code: it came as far as the folder that holds no images.
            assert jobs_of(head, tmp_path / night)[submission_id]["driver_exit_code"] == 2
    ((package, size),) = proxy.written
    assert package.startswith("/api/packages/gcs/") and 20e6 < size < 60e6


@pytest.mark.slow
def test_a_driver_killed_in_mid_run_is_told_by_its_exit_code_and_submitted_again(head: Head, tmp_path: Path) -> None:
    first = start(head, *arguments(head, tmp_path))
    assert first.stdout is not None
    for line in first.stdout:
        if "layout" in line:
            break
    first.send_signal(signal.SIGINT)
    _, error = first.communicate(timeout=60)
    assert first.returncode == 130 and "the job goes on" in error and "ray job stop" in error
    (submission_id,) = jobs_of(head, tmp_path)

    follower = start(head, *arguments(head, tmp_path))
    while len(list(tmp_path.glob("runs/*/shards/*.arrow"))) < 2:
        assert head.jobs()[submission_id]["status"] == "RUNNING"
    assert kill_processes(f"-m jobs score .*{tmp_path}") >= 1
    out, error = follower.communicate(timeout=120)
    assert follower.returncode == 137 and "exit code 137; submit it again to resume" in error, (out, error)
    assert rows(tmp_path) == 0

    again = alfa_alone(*arguments(head, tmp_path), **head.environment)
    assert again.returncode == 0, again.stderr
    assert f"{submission_id} has failed" in again.stderr and f"submitted as {submission_id}-2" in again.stderr
    assert "shards are finished already" in again.stdout and rows(tmp_path) == 24

    once_more = alfa_alone(*arguments(head, tmp_path), **head.environment)
    assert once_more.returncode == 0 and "has succeeded already" in once_more.stderr
    assert set(jobs_of(head, tmp_path)) == {submission_id, f"{submission_id}-2"}


@pytest.mark.slow
def test_a_job_that_fails_passes_its_exit_code_on(head: Head, tmp_path: Path) -> None:
    images, output = tmp_path / "in", tmp_path / "out"
    command = [*arguments(head, output), "--images", str(images)]
    empty = alfa_alone(*command, **head.environment)
    assert empty.returncode == 2 and "no images at" in empty.stdout and "exit code 2" in empty.stderr
    (images / "nut").mkdir(parents=True)
    (images / "nut" / "broken.jpg").write_bytes(b"broken")
    accepted = alfa_alone(*command, "--set", "engine.max_error_rate=0", "--no-wait", **head.environment)
    first, second = jobs_of(head, output)
    assert accepted.returncode == 0 and accepted.stdout.split() == [max(first, second)]
    assert {first, second} == {min(first, second), f"{min(first, second)}-2"}
    followed = alfa_alone(*command, "--set", "engine.max_error_rate=0", **head.environment)
    assert followed.returncode == 1 and "more than engine.max_error_rate (0) allows" in followed.stdout, followed.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_backfill_submits_the_nights_that_are_missing_and_goes_on_where_it_stopped(
    head: Head, tmp_path: Path
) -> None:
    first, second, third = nights = ["2026-01-01", "2026-01-02", "2026-01-03"]
    photos = sorted((ROOT / "infra" / "demo" / "images" / "hazelnut" / "test" / "good").iterdir())[:2]
    for night in (first, third):  # no photos yet on the second
        (tmp_path / night / "hazelnut").mkdir(parents=True)
        for photo in photos:
            shutil.copy(photo, tmp_path / night / "hazelnut")

    def backfill(*more: str) -> tuple[int, dict[str, str]]:
        done = alfa_alone(
            "backfill", "--images", tmp_path / "{run_date}", "--output", tmp_path / "out", "--set", "engine.lease_s=1",
            "--from", first, "--to", third, "--submit", "--address", head.address, "--stop-on-error",
            *more, limit_s=600, **head.environment,
        )  # fmt: skip
        return done.returncode, dict(re.findall(r"│ (2026-\d\d-\d\d) │ (.*?)\s*│", done.stdout))

    assert backfill() == (1, {first: "published", second: "refused, exit code 2", third: "not begun"})
    shutil.copytree(tmp_path / first, tmp_path / second)
    (tmp_path / "out" / "commits" / f"{first}.json").unlink()  # its job has succeeded, but it is published no more
    assert backfill() == (0, dict.fromkeys(nights, "published"))
    assert backfill() == (0, dict.fromkeys(nights, "was published"))
    names = sorted(name.removeprefix("alfa-")[:10] for name in jobs_of(head, tmp_path / "out"))
    assert names == [first, first, second, second, third] and rows(tmp_path / "out") == 6
    before = len(jobs_of(head, tmp_path / "out"))
    assert backfill("--again") == (0, dict.fromkeys(nights, "published"))
    assert len(jobs_of(head, tmp_path / "out")) == before + 3 and rows(tmp_path / "out") == 6


@pytest.mark.slow
def test_ray_job_submit_runs_a_job_file_with_the_code_of_the_checkout(head: Head, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"dataset: {{images: {ROOT}/infra/demo/images}}\noutput: {{uri: {tmp_path}/out}}\n")
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "job", "submit", "--working-dir", ".", "--", "alfa", "score", str(job), "--run-date", NIGHT]
    environment = {**os.environ, **head.environment, "RAY_ADDRESS": head.address}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "24, 24 ok" in done.stdout, done.stdout + done.stderr
    assert rows(tmp_path / "out") == 24
