"""Tests a backfill: nights run in order, published ones are skipped, and a failing one does not stop the others."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from jobs import exits
from jobs.backfill import run_backfill
from jobs.flags import JobFlags
from pipeline.lake import published_nights
from pipeline.storage import Store
from schemas.job import JobConfig, JobError
from tests.command import alfa_alone
from tests.jobs.nights import copy_photos, job_of, publish_as_scored
from tests.llm_server import LLMServer
from tests.nights import FIRST, FOURTH, SECOND, THIRD


class Scorer:
    """Publishes nights as if they had been scored; some end otherwise."""

    def __init__(self, endings: dict[str, int | Exception]) -> None:
        self.endings, self.nights = endings, list[str]()

    def __call__(self, job: JobConfig) -> int:
        night = str(job.run_date)
        self.nights.append(night)
        ending = self.endings.get(night, 0)
        if isinstance(ending, Exception):
            raise ending
        if ending == 0:
            publish_as_scored(job)
        return ending


def backfill(
    folder: Path, endings: dict[str, int | Exception], **options: bool
) -> tuple[int, list[str], dict[str, str]]:
    """The exit code, the nights that were tried, and the outcome of each night in the table."""
    scorer, text = Scorer(endings), io.StringIO()
    jobs = [job_of(folder, night) for night in (FIRST, SECOND, THIRD, FOURTH)]
    code = run_backfill(jobs, scorer, Console(file=text, width=120), **options)
    rows = re.findall(r"│ (2026-\d\d-\d\d) │ (.*?)\s*│", text.getvalue())
    return code, scorer.nights, dict(rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy_photos(tmp_path)
    return tmp_path


def test_published_nights_are_left_alone_unless_asked_for(folder: Path) -> None:
    publish_as_scored(job_of(folder, SECOND))
    code, nights, outcomes = backfill(folder, {})
    assert (code, nights) == (0, [FIRST, THIRD, FOURTH]) and outcomes[SECOND] == "was published"
    assert published_nights(Store(str(folder / "out"))) == [FIRST, SECOND, THIRD, FOURTH]
    assert backfill(folder, {})[:2] == (0, [])
    assert backfill(folder, {}, again=True)[:2] == (0, [FIRST, SECOND, THIRD, FOURTH])


def test_a_night_that_fails_costs_itself_alone_and_is_tried_again(folder: Path) -> None:
    endings = {FIRST: exits.ERRORS, SECOND: RuntimeError("a fault in alfa"), THIRD: exits.USAGE}
    code, nights, outcomes = backfill(folder, endings)
    assert (code, nights) == (1, [FIRST, SECOND, THIRD, FOURTH])
    assert list(outcomes.values()) == [
        "failed, exit code 1",
        "failed, exit code 1",
        "refused, exit code 2",
        "published",
    ]
    assert backfill(folder, {})[:2] == (0, [FIRST, SECOND, THIRD])


@pytest.mark.parametrize(
    ("ending", "options", "expected"),
    [
        (exits.ERRORS, {"stop_on_error": True}, 1),
        (exits.INTERRUPTED, {}, 130),
        (exits.USAGE, {"stop_on_error": True}, 2),
    ],
)
def test_nights_after_a_stop_are_not_begun(folder: Path, ending: int, options: dict[str, bool], expected: int) -> None:
    code, nights, outcomes = backfill(folder, {FIRST: ending}, **options)
    assert (code, nights) == (expected, [FIRST])
    assert [outcomes[night] for night in (SECOND, THIRD, FOURTH)] == ["not begun"] * 3


def test_a_range_is_read_once_and_holds_each_night_s_address(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("dataset: {images: 'photos/{run_date:%m/%d}'}\noutput: {uri: lake}\n")
    flags = JobFlags(file=str(tmp_path / "job.yaml"))
    jobs = flags.read_nights("2026-02-27", "2026-03-01")
    assert [job.dataset.images for job in jobs] == ["photos/02/27", "photos/02/28", "photos/03/01"]
    assert len(flags.read_nights("yesterday", "today")) == 2
    with pytest.raises(JobError, match="comes before"):
        flags.read_nights("today", "yesterday")


@pytest.mark.slow
def test_a_backfill_asks_the_llm_once_a_class_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    copy_photos(tmp_path)
    for night in (FIRST, THIRD):  # no photos on the second
        (tmp_path / "days" / night).parent.mkdir(exist_ok=True)
        (tmp_path / "days" / night).symlink_to(tmp_path / "in")
    with LLMServer() as server:
        arguments = [
            "backfill", "--images", tmp_path / "days" / "{run_date}", "--output", tmp_path / "out",
            "--llm", "openai/test", "--set", f"prompts.api_base={server.api_base}", "--from", FIRST, "--to", THIRD,
        ]  # fmt: skip
        done = alfa_alone(*arguments)
    assert done.returncode == 1, done.stderr
    assert server.requests == {"hazelnut": 1, "capsules": 1}
    outcomes = dict(re.findall(r"│ (2026-\d\d-\d\d) │ (.*?)\s*│", done.stdout))
    assert outcomes == {FIRST: "published", SECOND: "refused, exit code 2", THIRD: "published"}
    (tmp_path / "days" / SECOND).symlink_to(tmp_path / "in")
    again = alfa_alone(*arguments)
    assert again.returncode == 0, again.stderr
    outcomes = dict(re.findall(r"│ (2026-\d\d-\d\d) │ (.*?)\s*│", again.stdout))
    assert outcomes == {FIRST: "was published", SECOND: "published", THIRD: "was published"}
