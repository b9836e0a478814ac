"""Describes a run as an OpenLineage RunEvent (spec 2-0-2), for catalogs that understand it."""

from __future__ import annotations

import uuid
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit

from pipeline.storage import paths
from schemas.records import RunStats

_SPEC = "https://openlineage.io/spec"
_EVENTS = {"running": "RUNNING", "done": "COMPLETE", "failed": "FAIL", "interrupted": "ABORT"}


def run_event(stats: RunStats, output: str) -> dict[str, Any]:
    """Builds the event of a run's state. output: address of the lake.

    The UUID is derived from the lake's address and the run_id, so that all events of a run belong together, even after
    it was resumed.
    """
    names = ("errors", "anomalies", "scored_by_this_job", "images_per_second")
    counts = {name: getattr(stats, name) for name in names}
    facets = {
        "nominalTime": _facet(
            "facets/1-0-1/NominalTimeRunFacet.json#/$defs/NominalTimeRunFacet",
            nominalStartTime=f"{stats.run_date}T00:00:00Z",
        ),
        "alfa": _facet("2-0-2/OpenLineage.json#/$defs/RunFacet", runId=stats.run_id, model=stats.model, **counts),
    }
    if stats.error is not None:
        facets["errorMessage"] = _facet(
            "facets/1-0-0/ErrorMessageRunFacet.json#/$defs/ErrorMessageRunFacet",
            message=stats.error,
            programmingLanguage="PYTHON",
        )
    table: dict[str, Any] = _dataset(f"{output}/{paths.TABLE}")
    if stats.rows is not None:
        statistics = _facet(
            "facets/1-0-2/OutputStatisticsOutputDatasetFacet.json#/$defs/OutputStatisticsOutputDatasetFacet",
            rowCount=stats.rows,
        )
        table["outputFacets"] = {"outputStatistics": statistics}
    job_type = _facet(
        "facets/2-0-3/JobTypeJobFacet.json#/$defs/JobTypeJobFacet",
        processingType="BATCH",
        integration="ALFA",
        jobType="JOB",
    )
    return {
        "eventType": _EVENTS[stats.state],
        "eventTime": stats.updated_at.isoformat(),
        "producer": _producer(),
        "schemaURL": f"{_SPEC}/2-0-2/OpenLineage.json#/$defs/RunEvent",
        "run": {"runId": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{output}#{stats.run_id}")), "facets": facets},
        "job": {"namespace": output, "name": "alfa.score", "facets": {"jobType": job_type}},
        "inputs": [_dataset(stats.source)] if stats.source else [],
        "outputs": [table],
    }


def _dataset(address: str) -> dict[str, Any]:
    """Names a dataset as OpenLineage does: namespace s3://bucket and the key, or namespace file and the path."""
    parts = urlsplit(address)
    if not parts.scheme:
        return {"namespace": "file", "name": address}
    return {"namespace": f"{parts.scheme}://{parts.netloc}", "name": parts.path.strip("/") or "/"}


def _facet(schema: str, **values: Any) -> dict[str, Any]:
    return {"_producer": _producer(), "_schemaURL": f"{_SPEC}/{schema}", **values}


def _producer() -> str:
    try:
        return f"pkg:pypi/alfa-pipeline@{version('alfa-pipeline')}"
    except PackageNotFoundError:  # alfa submit uploads code without installing it
        return "pkg:pypi/alfa-pipeline"
