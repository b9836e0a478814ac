"""The flags of all commands that take a job, declared once, and how a job is read from them and its file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs import exits
from pipeline.storage import open_store
from schemas.job import JobConfig, JobError, Storage, parse_job, read_job_yaml, without_credentials


def _check_endpoint(value: str | None) -> str | None:
    try:
        return value if value is None else without_credentials(value)
    except ValueError as error:
        exits.refuse(f"--endpoint {error}")


Endpoint = Annotated[
    str | None,
    typer.Option(help="URL of an S3 other than AWS; default: AWS_ENDPOINT_URL.", callback=_check_endpoint),
]
"""The flag --endpoint of every command that opens a store."""


@dataclass(frozen=True)
class JobFlags:
    """The flags from the command line; None for those that were not given."""

    file: Annotated[str | None, typer.Argument(metavar="JOB", help="Job file (YAML): a path or a URI.")] = None
    images: Annotated[str | None, typer.Option(help="Folder, table or URI of the images.")] = None
    output: Annotated[str | None, typer.Option(help="Folder or URI for the results.")] = None
    endpoint: Endpoint = None
    layout: Annotated[str | None, typer.Option(help="auto, folders, flat, mvtec, visa or table.")] = None
    class_name: Annotated[str | None, typer.Option("--class", help="Class of all images (layout flat).")] = None
    llm: Annotated[str | None, typer.Option(help="litellm model that describes classes.")] = None
    model: Annotated[str | None, typer.Option(help="open_clip model, as NAME or NAME/PRETRAINED.")] = None
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the job.")
    ] = None

    def read_job(self, defaults: Mapping[str, Any] | None = None) -> JobConfig:
        """Reads the job from its file, --set and the flags; the later ones win.

        defaults: sections to use where the file has none. Raises JobError where the file cannot be read or the job is
        invalid.
        """
        return parse_job({**(defaults or {}), **self._read_document()}, self.overrides or (), self._keys())

    def read_nights(self, first: str, last: str) -> list[JobConfig]:
        """Reads the file once, and returns a job for each night from `first` to `last` (a date, today or yesterday).

        Raises JobError as read_job does, and where the last night comes before the first.
        """
        document = self._read_document()

        def job_of(night: str) -> JobConfig:
            return parse_job(document, self.overrides or (), {**self._keys(), "run_date": night})

        start, end = (job_of(night).run_date for night in (first, last))
        if end < start:
            raise JobError(f"the last night, {end}, comes before the first, {start}")
        return [job_of(str(start + timedelta(days=number))) for number in range((end - start).days + 1)]

    def _read_document(self) -> dict[str, Any]:
        return read_job_yaml(_read_text(self.file, self.storage())) if self.file else {}

    def storage(self) -> Storage:
        """Returns how to reach the store of the job file, before there is a job."""
        return Storage(endpoint_url=self.endpoint)

    def _keys(self) -> dict[str, Any]:
        """Returns the job's keys that have flags, with the flags' values."""
        name, _, pretrained = (self.model or "").partition("/")
        return {
            "dataset.images": self.images,
            "dataset.layout": self.layout,
            "dataset.class_name": self.class_name,
            "output.uri": self.output,
            "storage.endpoint_url": self.endpoint,
            "prompts.llm": self.llm,
            "model.name": name or None,
            "model.pretrained": pretrained or None,
        }


@dataclass(frozen=True)
class NightFlags(JobFlags):
    """The flags of a job and its night."""

    run_date: Annotated[str | None, typer.Option(help="The night: YYYY-MM-DD, today or yesterday.")] = None

    def _keys(self) -> dict[str, Any]:
        return {**super()._keys(), "run_date": self.run_date}


def spread_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Decorates a command whose first parameter is a JobFlags or NightFlags, so that typer sees each flag of it."""
    first, *others = inspect.signature(command, eval_str=True).parameters.values()
    kind = first.annotation
    flags = inspect.signature(kind, eval_str=True).parameters

    @wraps(command)
    def spread(**values: Any) -> None:
        command(kind(**{name: values.pop(name) for name in flags}), **values)

    # Keyword-only, because parameters without a default may then follow those with one; typer passes all by name.
    named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*flags.values(), *others)]
    spread.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    return spread


def _read_text(location: str, storage: Storage) -> str:
    try:
        if "://" in location:
            folder, _, name = location.rpartition("/")
            return open_store(folder, storage).read(name).decode()
        return Path(location).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"the job file {location} cannot be read: {error}") from None
