"""Reads a job from YAML, overrides and flags; every error names the key and what is allowed."""

from __future__ import annotations

import datetime
import difflib
import json
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from schemas.job.config import JobConfig
from schemas.job.dates import resolve_dates
from schemas.text import one_line

_BRANCH = re.compile(r"^constrained-|[\[(]")
"""Matches pydantic's names for branches of a union, such as constrained-int or literal['auto'], and no key."""


class JobError(ValueError):
    """A job is invalid; the message names each key at fault and what is allowed there."""


def parse_job(
    document: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> JobConfig:
    """Builds a job from a YAML document, `key.path=value` overrides and flags (dotted keys).

    Overrides win over the document, and flags win over both. Raises JobError with one line per fault; each names the
    key, what is wrong and what is allowed.
    """
    try:
        merged: dict[str, Any] = json.loads(json.dumps(document or {}, default=str))
    except (TypeError, ValueError, RecursionError) as error:
        raise JobError(f"the job must hold plain keys and values: {one_line(str(error))}") from None
    assignments = [_parse_override(item) for item in overrides]
    assignments += [(key.split("."), value) for key, value in (flags or {}).items() if value is not None]
    for path, value in assignments:
        _assign(merged, path, value)
    try:
        merged = resolve_dates(merged, datetime.datetime.now(datetime.timezone.utc))
    except ValueError as error:
        raise JobError("\n".join(one_line(line) for line in str(error).splitlines())) from None
    try:
        return JobConfig.model_validate(merged)
    except ValidationError as error:
        lines = dict.fromkeys(one_line(_explain(fault)) for fault in error.errors())
        raise JobError("\n".join(lines)) from None


def read_job_yaml(text: str) -> dict[str, Any]:
    """Parses the mapping in a YAML text. Raises JobError if it is not valid YAML, or not a mapping."""
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        raise JobError(f"the job file is not valid YAML: {one_line(str(error))}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise JobError(f"the job file must hold keys and values, not a {type(document).__name__}")
    return document


def dump_job_yaml(job: JobConfig) -> str:
    """Writes the resolved job as YAML with every key; it parses back to the same job."""
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _parse_override(item: str) -> tuple[list[str], Any]:
    key, separator, value = item.partition("=")
    if not separator or not key.strip():
        raise JobError(f"--set {one_line(item)}: write it as key=value, such as --set model.name=ViT-B-16")
    try:
        return key.strip().split("."), yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return key.strip().split("."), value


def _assign(target: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        child = target[name] = {} if target.get(name) is None else target[name]
        if not isinstance(child, dict):
            raise JobError(one_line(f"{'.'.join(path)}: {name} holds a value, not keys"))
        target = child
    target[path[-1]] = value


def _explain(fault: Any) -> str:
    location = _path_of(fault["loc"], fault["type"] in ("extra_forbidden", "missing"))
    if fault["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}? " if near else ""
        return f"{'.'.join(location)}: no such key; {hint}allowed here: {', '.join(known)}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if fault["type"] == "missing":
        return f"{'.'.join(location)}: required, but not given{_purpose(location)}"
    where = ".".join(location) or "job"
    given = fault.get("input")
    secret = fault["type"] == "value_error"
    shown = f" (given: {str(given)[:80]!r})" if isinstance(given, (str, int, float, bool)) and not secret else ""
    return f"{where}: {message}{shown}"


def _path_of(location: Sequence[int | str], ends_in_key: bool) -> list[str]:
    """Returns the key of a fault, without the branch names that pydantic adds for a union."""
    steps = [str(step) for step in location]
    branches = len(steps) - ends_in_key
    steps = [step for step in steps[:branches] if not _BRANCH.search(step)] + steps[branches:]
    for end, name in enumerate(steps):
        field = _model_at(steps[:end]).model_fields.get(name)
        if field is not None and _submodel(field.annotation) is None:
            return steps[: end + 1]
    return steps


def _model_at(path: Sequence[str]) -> type[BaseModel]:
    model: type[BaseModel] = JobConfig
    for name in path:
        field = model.model_fields.get(name)
        found = None if field is None else _submodel(field.annotation)
        if found is None:
            return model
        model = found
    return model


def _submodel(annotation: Any) -> type[BaseModel] | None:
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _keys_at(path: Sequence[str]) -> list[str]:
    return list(_model_at(path).model_fields)


def _purpose(path: Sequence[str]) -> str:
    field = _model_at(path[:-1]).model_fields.get(path[-1]) if path else None
    return f": {field.description}" if field is not None and field.description else ""
