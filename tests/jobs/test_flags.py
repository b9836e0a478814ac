from pathlib import Path

import pytest
import typer

from jobs.cli import app
from jobs.flags import JobFlags, NightFlags
from schemas.job import JobError
from tests.command import alfa


def flags_of(command: str) -> set[str]:
    group = typer.main.get_command(app)
    return {flag for parameter in group.commands[command].params for flag in parameter.opts}


@pytest.mark.parametrize("command", ["score", "submit", "prompts", "check", "evaluate"])
def test_commands_with_a_job_take_its_flags_and_those_with_a_night_its_date(command: str) -> None:
    flags = {"--images", "--output", "--layout", "--class", "--llm", "--model", "--set"}
    assert flags_of(command) >= flags
    assert ("--run-date" in flags_of(command)) is (command in ("score", "submit"))


def test_flags_win_over_set_which_wins_over_the_file_which_wins_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("dataset: {images: file, layout: mvtec}\noutput: {uri: file}\n")
    flags = NightFlags(
        str(file), images="flag", overrides=["dataset.images=set", "output.uri=set"], run_date="2026-01-02"
    )
    job = flags.read_job({"dataset": {"images": "default"}, "threshold": {"policy": "fixed"}})
    assert (job.dataset.images, job.output.uri, job.dataset.layout) == ("flag", "set", "mvtec")
    assert job.threshold.policy == "fixed" and str(job.run_date) == "2026-01-02"


@pytest.mark.parametrize(
    ("model", "name", "pretrained"),
    [
        ("alfa-small", "alfa-small", None),
        ("ViT-B-16/openai", "ViT-B-16", "openai"),
        ("B//models/b.pt", "B", "/models/b.pt"),
    ],
)
def test_a_model_is_a_name_and_perhaps_weights(model: str, name: str, pretrained: str | None) -> None:
    job = JobFlags(images="x", output="y", model=model).read_job()
    assert (job.model.name, job.model.pretrained) == (name, pretrained)


def test_a_job_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(JobError, match=r"job\.yaml cannot be read"):
        JobFlags(str(file)).read_job()


@pytest.mark.parametrize(
    "command",
    [
        ["score", "--images", "s4://photos", "--output", "lake"],
        ["status", "s4://lake"],
        ["report", "s4://lake"],
        ["gc", "s4://lake"],
        ["export", "s4://lake", "2026-01-02", "--to", "coco"],
        ["diff", "s4://lake"],
        ["calibrate", "s4://lake", "run", "--table", "thresholds.json"],
        ["evaluate", "--output", "s4://lake", "--run", "run"],
    ],
)
def test_a_misspelt_address_is_one_line_and_bad_usage(command: list[str]) -> None:
    done = alfa(*command)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "alfa: s4://" in done.stderr and "cannot be opened: Protocol not known: s4" in done.stderr
