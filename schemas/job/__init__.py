"""The models of a job, and how a job is read from YAML, overrides and flags."""

from schemas.job.config import (
    EMBEDDED_MODEL,
    EMBEDDED_NOTE,
    FORMER_EMBEDDED_MODELS,
    Dataset,
    Engine,
    JobConfig,
    Method,
    Model,
    Peers,
    Prompts,
    References,
    Storage,
    add_span,
    without_credentials,
)
from schemas.job.parsing import JobError, dump_job_yaml, parse_job, read_job_yaml

__all__ = [
    "EMBEDDED_MODEL",
    "EMBEDDED_NOTE",
    "FORMER_EMBEDDED_MODELS",
    "Dataset",
    "Engine",
    "JobConfig",
    "JobError",
    "Method",
    "Model",
    "Peers",
    "Prompts",
    "References",
    "Storage",
    "add_span",
    "dump_job_yaml",
    "parse_job",
    "read_job_yaml",
    "without_credentials",
]
