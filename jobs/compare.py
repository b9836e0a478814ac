"""The jobs that `alfa evaluate --compare` asks for: each differs from the given one in some keys."""

from __future__ import annotations

import itertools
import logging
import re
import shlex
from collections.abc import Sequence
from typing import Any

from schemas.job import JobConfig, JobError, Peers, parse_job

logger = logging.getLogger(__name__)

BASE = "base"

_COMMA = re.compile(r",(?![^\[{]*[\]}])")
"""A comma between alternatives, not one inside a list such as [-1,-2]."""


def expand(
    job: JobConfig, comparisons: Sequence[str], shots: Sequence[int] = (), peers: Sequence[int] = ()
) -> dict[str, JobConfig]:
    """Builds the jobs to compare, by name: the given one as `base`, then those that the comparisons describe.

    A job that would give the same scores as one before it is left out. A comparison `key=v1,v2 key2=v3,v4` stands for
    all combinations of its alternatives; several comparisons follow one another. shots: numbers of reference images to
    try, 0 for none; they are taken from the job's references, or from the train images where it has none. peers:
    numbers of peers to try, 0 for none.
    Raises JobError where a combination is no valid job, or would change the images.
    """
    document = job.model_dump(mode="json")
    found: dict[str, JobConfig] = {BASE: job}
    facts = [_facts(job)]
    for comparison in comparisons:
        axes = [[(key, value) for value in values] for key, values in map(_axis, _split(comparison))]
        for chosen in itertools.product(*axes):
            variant = parse_job(document, [f"{key}={value}" for key, value in chosen])
            if (variant.dataset, variant.output, variant.storage) != (job.dataset, job.output, job.storage):
                raise JobError(f"--compare {comparison}: all configurations score the same images into the same output")
            name = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in chosen)
            if _facts(variant) in facts:
                logger.info(
                    "%s gives the same scores as %s and is left out", name, list(found)[facts.index(_facts(variant))]
                )
                continue
            facts.append(_facts(variant))
            found[name] = variant
    counts = [(f"shots={count}", _with_shots(job, count)) for count in shots]
    counts += [(f"peers={count}", _with_peers(job, count)) for count in peers]
    for name, variant in counts:
        if _facts(variant) not in facts:
            facts.append(_facts(variant))
            found[name] = variant
    return found


def _with_peers(job: JobConfig, count: int) -> JobConfig:
    document = job.model_dump(mode="json")
    if not count:
        return parse_job({**document, "peers": None})
    known = document["peers"] or Peers().model_dump(mode="json")
    fewest = min(count, known["min_images"])
    return parse_job({**document, "peers": {**known, "images": count, "min_images": fewest}})


def _with_shots(job: JobConfig, count: int) -> JobConfig:
    document = job.model_dump(mode="json")
    if not count:
        return parse_job({**document, "references": None})
    known = document["references"] or {"images": "train"}
    return parse_job({**document, "references": {**known, "shots": count}})


def describe_base(
    job: JobConfig, comparisons: Sequence[str], shots: Sequence[int] = (), peers: Sequence[int] = ()
) -> str:
    """Says what the compared keys are in the given job, such as `adaptation=mean, aligner=raw, shots=0`."""
    resolved = {**job.model_dump(mode="json"), **_facts(job)}
    keys = dict.fromkeys(key for comparison in comparisons for key, _ in map(_axis, _split(comparison)))
    described = [f"{key.rpartition('.')[2]}={_value_at(resolved, key)}" for key in keys]
    if shots:
        described.append(f"shots={0 if job.references is None else job.references.shots}")
    if peers:
        described.append(f"peers={0 if job.peers is None else job.peers.images}")
    return ", ".join(described)


def _facts(job: JobConfig) -> dict[str, Any]:
    """The options that determine the scores of given images."""
    elsewhere = {"dataset", "output", "storage", "run_date", "timezone", "engine", "threshold"}
    document = job.model_dump(mode="json", exclude=elsewhere)
    document["method"] = job.resolved_method.model_dump(mode="json")
    return document


def _value_at(document: dict[str, Any], key: str) -> Any:
    value: Any = document
    for step in key.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return "default" if value is None else value


def _split(comparison: str) -> list[str]:
    try:
        return shlex.split(comparison)
    except ValueError as error:
        raise JobError(f"--compare {comparison}: {error}") from None


def _axis(assignment: str) -> tuple[str, list[str]]:
    key, separator, values = assignment.partition("=")
    if not separator or not key or not values:
        raise JobError(f"--compare {assignment}: write it as key=value,value, such as method.adaptation=none,mean")
    return key, _COMMA.split(values)
