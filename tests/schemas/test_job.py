import datetime

import pytest

from schemas.job import JobConfig, JobError, dump_job_yaml, parse_job, read_job_yaml
from schemas.job.dates import resolve_dates

MINIMAL = {"dataset": {"images": "photos"}, "output": {"uri": "lake"}}


def fault_of(document: dict[str, object], *overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        parse_job({**MINIMAL, **document}, overrides)
    return str(caught.value)


def test_flags_win_over_overrides_and_those_over_the_document() -> None:
    document = {**MINIMAL, "model": {"batch_size": 1, "image_size": 10}, "run_date": "2026-01-01"}
    job = parse_job(
        document, ["model.batch_size=2", "run_date=2026-01-02"], {"run_date": "2026-01-03", "prompts.llm": None}
    )
    assert (job.model.batch_size, job.model.image_size, job.run_date) == (2, 10, datetime.date(2026, 1, 3))
    assert job.prompts.llm is None


def test_misspelt_key_is_refused_with_the_nearest_right_name() -> None:
    assert "dataset.imags: no such key; did you mean dataset.images?" in fault_of({"dataset": {"imags": "x"}})
    assert "outptu: no such key; did you mean output?" in fault_of({"outptu": 1})


def test_every_fault_has_its_own_line_with_key_and_what_is_allowed() -> None:
    lines = fault_of({"dataset": {"images": "x", "layout": "tree"}, "engine": {"shard_size": 0}}).splitlines()
    assert [line.split(":")[0] for line in lines] == ["dataset.layout", "engine.shard_size"]
    assert "'mvtec'" in lines[0] and "greater than or equal to 1" in lines[1]


def test_fault_inside_a_choice_names_the_key_alone() -> None:
    assert all(line.startswith("engine.actors: ") for line in fault_of({}, "engine.actors=many").splitlines())


def test_credentials_in_a_uri_are_refused_and_not_repeated() -> None:
    message = fault_of({"dataset": {"images": "s3://AKIA:hunter2@bucket/x"}})
    assert "dataset.images" in message and "environment" in message and "hunter2" not in message


def test_a_real_model_needs_named_weights() -> None:
    assert "pretrained is required for ViT-B-16" in fault_of({"model": {"name": "ViT-B-16"}})


def test_flat_layout_needs_a_class() -> None:
    assert "--class" in fault_of({"dataset": {"images": "x", "layout": "flat"}})


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "!!python/object/apply:os.system ['true']"])
def test_job_files_that_are_no_mapping_are_refused(text: str) -> None:
    with pytest.raises(JobError):
        read_job_yaml(text)


def test_a_stored_job_reads_back_as_itself() -> None:
    job = parse_job({**MINIMAL, "threshold": {"policy": "quantile", "quantile": 0.9}})
    assert parse_job(read_job_yaml(dump_job_yaml(job))) == job


def addresses(job: JobConfig) -> tuple[str, str, str | None]:
    assert job.references is not None
    return job.dataset.images, job.references.images, job.threshold.table


def dated(**night: str) -> JobConfig:
    return parse_job(
        {
            "dataset": {"images": "s3://factory/photos/{run_date}"},
            "references": {"images": "good/{run_date:%Y/%m/%d}/{{lot}}"},
            "threshold": {"policy": "labels", "table": "{run_date:%G-W%V}.json"},
            "output": {"uri": "s3://lake/{not-a-date}"},
            **night,
        }
    )


def test_addresses_hold_the_date_of_the_night() -> None:
    job = dated(run_date="2027-01-02")
    assert addresses(job) == ("s3://factory/photos/2027-01-02", "good/2027/01/02/{lot}", "2026-W53.json")
    assert job.output.uri == "s3://lake/{not-a-date}"
    assert job == dated(run_date="2027-01-02") and job != dated(run_date="2027-01-03")
    assert job.result_fingerprint("w", "p") != dated(run_date="2027-01-03").result_fingerprint("w", "p")


def test_a_stored_job_holds_what_was_filled_in_and_reads_back_with_its_braces() -> None:
    job = dated(run_date="2027-01-02")
    text = dump_job_yaml(job)
    assert "s3://factory/photos/2027-01-02\n" in text and "good/2027/01/02/{{lot}}\n" in text
    assert parse_job(read_job_yaml(text)) == job


@pytest.mark.parametrize(
    ("zone", "word", "night"),
    [
        ("UTC", "today", "2026-07-14"),
        ("UTC", "yesterday", "2026-07-13"),
        ("Europe/Berlin", "today", "2026-07-15"),
        ("Europe/Berlin", "yesterday", "2026-07-14"),
        ("America/Los_Angeles", "today", "2026-07-14"),
    ],
)
def test_the_time_zone_says_which_day_it_is(zone: str, word: str, night: str) -> None:
    """At 01:30 in Stuttgart, in summer."""
    now = datetime.datetime(2026, 7, 14, 23, 30, tzinfo=datetime.timezone.utc)
    found = resolve_dates({"timezone": zone, "run_date": word, "dataset": {"images": "{run_date}"}}, now)
    assert (found["run_date"], found["dataset"]["images"]) == (night, night)
    assert word != "today" or resolve_dates({"timezone": zone}, now)["run_date"] == night


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("{date}/x", "no such placeholder: {date}; allowed: {run_date}"),
        ("{}/x", "no such placeholder: {}"),
        ("{run_date!r}", "no such placeholder: {run_date}"),
        ("{run_date.year}", "no such placeholder: {run_date.year}"),
        ("{run_date:%Y/%H}", "%H is not part of a date"),
        ("{run_date:%}", "% is not part of a date"),
        ("lot {7", "write a brace that belongs to the address twice"),
        ("lot 7}", "write a brace that belongs to the address twice"),
    ],
)
def test_what_is_no_date_in_braces_is_refused_by_name(address: str, said: str) -> None:
    message = fault_of({"dataset": {"images": address}, "threshold": {"table": address}})
    assert [line.split(":")[0] for line in message.splitlines()] == ["dataset.images", "threshold.table"]
    assert message.count(said) == 2


@pytest.mark.parametrize("zone", ["Europe/Stuttgart", "Europe", "../etc/passwd", "7"])
def test_an_unknown_time_zone_is_refused(zone: str) -> None:
    assert "timezone: no such time zone" in fault_of({"timezone": zone})


def test_a_night_that_is_no_date_is_refused() -> None:
    assert "run_date: " in fault_of({"run_date": "2026-02-30"}) and "run_date: " in fault_of({"run_date": "tomorrow"})


def changed(*overrides: str) -> JobConfig:
    return parse_job(MINIMAL, ["run_date=2026-01-01", *overrides])


@pytest.mark.parametrize(
    "override", ["engine.actors=4", "prompts.timeout_s=5", "output.uri=s3://b/x", "model.batch_size=3"]
)
def test_how_fast_or_where_it_runs_does_not_make_another_run(override: str) -> None:
    assert changed(override).result_fingerprint("w", "p") == changed().result_fingerprint("w", "p")


@pytest.mark.parametrize(
    "override", ["method.adaptation=none", "threshold.value=0.4", "dataset.images=other", "output.maps=true"]
)
def test_what_determines_rows_makes_another_run(override: str) -> None:
    assert changed(override).result_fingerprint("w", "p") != changed().result_fingerprint("w", "p")


def test_weights_and_prompts_make_another_run() -> None:
    assert len({changed().result_fingerprint(w, p) for w in "ab" for p in "ab"}) == 4


@pytest.mark.parametrize(
    ("overrides", "aligner", "levels"),
    [
        ([], "raw", (-1, -2)),
        (["method.levels=[-1]"], "raw", (-1,)),
        (["method.aligner=value"], "value", (-1,)),
        (["model.pretrained=tuned.safetensors"], "raw", (-1, -2)),
        (["model.name=ViT-B-16", "model.pretrained=openai"], "value", (-1,)),
        (["model.name=ViT-B-16", "model.pretrained=openai", "method.aligner=raw"], "raw", (-1,)),
        (["model.name=alfa-tiny"], "raw", (-1,)),
    ],
)
def test_aligner_and_levels_follow_from_the_model(overrides: list[str], aligner: str, levels: tuple[int, ...]) -> None:
    job = changed(*overrides)
    assert (job.resolved_method.aligner, job.resolved_method.levels) == (aligner, levels)
    facts = job.scoring_facts()["method"]
    assert (facts["aligner"], facts["levels"]) == (aligner, list(levels))
    assert job.result_fingerprint("w", "p") == changed(*overrides, f"method.levels={list(levels)}").result_fingerprint(
        "w", "p"
    )
