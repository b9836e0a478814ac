"""Tests the metrics of a run for Prometheus, and its events for OpenLineage."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.lake import exposition, run_event
from schemas.records import RunStats

STATS = RunStats.model_validate(
    {
        "run_id": "2026-01-02-abc",
        "run_date": "2026-01-02",
        "model": "ViT-B-16/openai",
        "state": "failed",
        "images": 10,
        "shards": 2,
        "scored_by_this_job": 6,
        "images_per_second": 2.5,
        "scoring_images_per_second": 4.5,
        "total_seconds": 9.5,
        "errors": {"corrupt": 2},
        "anomalies": {'we"ird\n\\class': 3},
        "usage": {"calls": 1, "prompt_tokens": 20, "completion_tokens": 30, "cost_usd": None},
        "started_at": "2026-01-02T01:00:00+00:00",
        "updated_at": "2026-01-02T01:00:10+00:00",
        "source": "s3://factory/photos",
        "error": "the disk is full",
    }
)


def test_prometheus_reads_back_what_stats_say() -> None:
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(exposition(STATS).decode())
        for sample in family.samples
    }
    assert samples["alfa_run_info", "ViT-B-16/openai", "2026-01-02", "2026-01-02-abc"] == 1
    assert [samples["alfa_run_state", state] for state in ("running", "done", "failed")] == [0, 0, 1]
    assert samples[("alfa_run_scoring_images_per_second",)] == 4.5
    assert samples[("alfa_run_total_seconds",)] == 9.5
    assert samples["alfa_run_anomalous_images", 'we"ird\n\\class'] == 3
    assert samples["alfa_run_errors", "corrupt"] == 2 and samples["alfa_run_llm_tokens", "completion"] == 30
    assert samples[("alfa_run_updated_timestamp_seconds",)] - samples[("alfa_run_started_timestamp_seconds",)] == 10


def facets_of(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        for name, value in part.items():
            if name.lower().endswith("facets"):
                yield from value.values()
            yield from facets_of(value)
    elif isinstance(part, list):
        for item in part:
            yield from facets_of(item)


def test_the_lineage_event_is_a_run_event_of_its_run() -> None:
    event = run_event(STATS, "s3://lake/inspection")
    assert event["eventType"] == "FAIL" and event["eventTime"] == "2026-01-02T01:00:10+00:00"
    assert {"producer", "schemaURL", "run", "job"} <= set(event)
    assert event["inputs"] == [{"namespace": "s3://factory", "name": "photos"}]
    assert event["outputs"] == [{"namespace": "s3://lake", "name": "inspection/scores"}]
    assert event["run"]["facets"]["errorMessage"]["message"] == "the disk is full"
    assert event["run"]["facets"]["alfa"]["errors"] == {"corrupt": 2}
    assert all({"_producer", "_schemaURL"} <= set(facet) for facet in facets_of(event))

    done = run_event(STATS.model_copy(update={"state": "done", "rows": 10, "error": None}), "s3://lake/inspection")
    assert done["eventType"] == "COMPLETE" and "errorMessage" not in done["run"]["facets"]
    assert done["outputs"][0]["outputFacets"]["outputStatistics"]["rowCount"] == 10
    assert uuid.UUID(done["run"]["runId"]) == uuid.UUID(event["run"]["runId"])
    other = run_event(STATS, "s3://lake/another")
    assert other["run"]["runId"] != event["run"]["runId"]


@pytest.mark.parametrize(
    ("address", "photos", "scores"),
    [
        ("s3://lake/a/b", ("s3://lake", "a/b"), ("s3://lake", "a/b/scores")),
        ("s3://lake", ("s3://lake", "/"), ("s3://lake", "scores")),
        ("/data/photos", ("file", "/data/photos"), ("file", "/data/photos/scores")),
    ],
)
def test_datasets_are_named_as_openlineage_names_them(
    address: str, photos: tuple[str, str], scores: tuple[str, str]
) -> None:
    event = run_event(STATS.model_copy(update={"source": address}), address)
    named = [(item["namespace"], item["name"]) for item in [*event["inputs"], *event["outputs"]]]
    assert named == [photos, scores] and event["job"]["namespace"] == address
