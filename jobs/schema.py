"""`alfa schema`: prints the DDL of the scores table, or the JSON schema of job files."""

from __future__ import annotations

import sys

from jobs.console import print_json
from pipeline.lake import render_ddl
from schemas.job import JobConfig


def print_ddl(dialect: str, output_uri: str) -> int:
    """Prints the statements that create the scores table of an output in a query engine. Returns the exit code."""
    sys.stdout.write(render_ddl(dialect, output_uri))
    return 0


def print_job_schema() -> int:
    """Prints the JSON schema of job files, with the description of each key. Returns the exit code."""
    document = JobConfig.model_json_schema()
    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **document})
    return 0
