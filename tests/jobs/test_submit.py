"""Tests the parts of a submission: its id, its command, its code and its log."""

from __future__ import annotations

import shlex
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus
from rich.console import Console

from jobs import submit
from jobs.logs import LogFormat
from jobs.submit import copy_code, entrypoint_of, find_or_submit, follow, run_submit, submission_id_of
from pipeline.engine import EngineError
from schemas.job import JobConfig, parse_job


def job_of(*overrides: str, **keys: Any) -> JobConfig:
    document = {"dataset": {"images": "s3://factory/photos"}, "output": {"uri": "s3://lake/out"}}
    return parse_job({**document, "run_date": "2026-01-02", **keys}, overrides)


@pytest.mark.parametrize("upload", [True, False])
def test_the_command_makes_the_same_job_on_the_cluster(upload: bool) -> None:
    job = job_of(
        "dataset.images=/data/it's a folder of {run_date}; $(rm) {{lot}} 😀", "dataset.layout=flat",
        "dataset.class_name='007'",
        "method.levels=[-1, -3]", "output.maps=true", "engine.actors=4", "threshold.mask_value=0.25",
        "model.name=ViT-B-16", "model.pretrained='null'", "prompts.llm=openai/gpt-4o-mini",
    )  # fmt: skip
    words = shlex.split(entrypoint_of(job, upload=upload))
    end = words.index("score") + 1
    assert words[:end] == (["python", "-m", "jobs", "score"] if upload else ["alfa", "score"])
    assert words[end : end + 2] == ["--run-date", "2026-01-02"] and set(words[end + 2 :: 2]) == {"--set"}
    assert parse_job(None, words[end + 3 :: 2], {"run_date": words[end + 1]}) == job


def test_a_job_joins_the_cluster_that_it_was_submitted_to() -> None:
    assert "elsewhere" not in entrypoint_of(job_of("engine.address=ray://elsewhere:10001"), upload=True)


def test_the_id_is_that_of_the_night_and_of_all_that_makes_its_rows() -> None:
    submission_id = submission_id_of(job_of())
    assert submission_id.startswith("alfa-2026-01-02-") and submission_id == submission_id_of(job_of())
    assert submission_id == submission_id_of(job_of("engine.actors=7"))
    others = ["run_date=2026-01-03", "output.uri=s3://lake/else", "prompts.llm=openai/x", "threshold.value=0.4"]
    others += ["dataset.images=s3://factory/else", "storage.endpoint_url=http://other:9000"]
    ids = {submission_id_of(job_of(other)) for other in others}
    assert len(ids) == len(others) and submission_id not in ids


def test_only_code_is_uploaded_and_stays_below_60_mb(tmp_path: Path) -> None:
    copy_code(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path).parts[0] for path in files} == {"schemas", "pipeline", "jobs"}
    assert {path.suffix for path in files} <= {".py", ".json", ".md", ".safetensors", ".css", ".js", ".j2", ".typed"}
    assert sum(path.stat().st_size for path in files) < 60e6


class FlakyHead:
    """Ray's client of a head that is not up when it is asked to submit, and whose answers break off: twice in mid-log,
    once where it is asked for the job's state."""

    def __init__(self) -> None:
        self.tails = self.asked = self.submits = 0
        self.jobs: list[JobDetails] = []

    def list_jobs(self) -> list[JobDetails]:
        return self.jobs

    def submit_job(self, entrypoint: str, submission_id: str) -> None:
        self.submits += 1
        if self.submits == 1:
            raise RuntimeError("Request failed with status code 500: No available agent to submit job")
        state = JobStatus.FAILED if self.submits == 2 else JobStatus.PENDING
        details = JobDetails(type="SUBMISSION", status=state, entrypoint=entrypoint, submission_id=submission_id)
        self.jobs.append(details)

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.tails += 1
        for chunk in [["one\ntw"], ["one\n"], ["one\n", "two\nthree\n", "end\n"]][self.tails - 1]:
            yield chunk
        if self.tails < 3:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_info(self, job_id: str) -> JobDetails:
        self.asked += 1
        if self.asked == 1:
            raise ConnectionError("Failed to connect to Ray")
        status = JobStatus.RUNNING if self.tails < 3 else JobStatus.SUCCEEDED
        return JobDetails(type="SUBMISSION", status=status, entrypoint="alfa")


def test_a_log_that_breaks_off_is_taken_up_where_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "_POLL_S", 0.0)
    head = FlakyHead()
    assert follow(head, "alfa-2026-01-02-abc").status is JobStatus.SUCCEEDED  # type: ignore[arg-type]
    assert capsys.readouterr().out == "one\ntwo\nthree\nend\n" and head.asked == 4


def test_a_head_that_comes_up_is_waited_for_and_attempts_are_numbered() -> None:
    head = FlakyHead()
    outcomes = [
        find_or_submit(head, "alfa-x", "alfa score", upload=False, again=False)  # type: ignore[arg-type]
        for _ in range(3)
    ]
    assert outcomes == [("alfa-x", None), ("alfa-x-2", None), ("alfa-x-2", JobStatus.PENDING)]
    assert head.submits == 3


def test_a_head_that_takes_requests_and_does_not_answer_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)  # set by run_submit: it is to be as before afterwards
        with pytest.raises(EngineError, match=f"^the Ray head at {address} cannot be used: .*timed out.*--address"):
            run_submit(job_of(), address, Console(), LogFormat.TEXT, upload=True, wait=False)
