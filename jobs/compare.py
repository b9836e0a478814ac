"""Builds the jobs for `alfa evaluate --compare`: each differs from the given job in some keys."""

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
"""Matches a comma between alternatives, but not one inside a list such as [-1,-2]."""


def expand(
    job: JobConfig, comparisons: Sequence[str], shots: Sequence[int] = (), peers: Sequence[int] = ()
) -> dict[str, JobConfig]:
    """Builds the jobs to compare, by name: the given job as `base`, then one for each variant.

    A job that would give the same scores as an earlier one is left out.

    Args:
        job: the job to vary.
        comparisons: each `key=v1,v2 key2=v3,v4` stands for all combinations of its alternatives.
        shots: numbers of reference images to try, 0 for none. They come from the job's references, or from the train
            images if it has none.
        peers: numbers of peers to try, 0 for none.

    Raises JobError where a combination is not a valid job, or would change the images.
    """
    document = job.model_dump(mode="json")
    found: dict[str, JobConfig] = {BASE: job}
    seen = [_scoring_options(job)]
    for comparison in comparisons:
        axes = [[(key, value) for value in values] for key, values in map(_parse_alternatives, _split(comparison))]
        for chosen in itertools.product(*axes):
            variant = parse_job(document, [f"{key}={value}" for key, value in chosen])
            if (variant.dataset, variant.output, variant.storage) != (job.dataset, job.output, job.storage):
                raise JobError(f"--compare {comparison}: all configurations score the same images into the same output")
            name = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in chosen)
            if (options := _scoring_options(variant)) in seen:
                logger.info("%s gives the same scores as %s and is left out", name, list(found)[seen.index(options)])
                continue
            seen.append(options)
            found[name] = variant
    counts = [(f"shots={count}", _with_shots(job, count)) for count in shots]
    counts += [(f"peers={count}", _with_peers(job, count)) for count in peers]
    for name, variant in counts:
        if (options := _scoring_options(variant)) not in seen:
            seen.append(options)
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
    """Describes the compared keys of the given job, such as `adaptation=mean, aligner=raw, shots=0`."""
    resolved = {**job.model_dump(mode="json"), **_scoring_options(job)}
    keys = dict.fromkeys(key for comparison in comparisons for key, _ in map(_parse_alternatives, _split(comparison)))
    described = [f"{key.rpartition('.')[2]}={_value_at(resolved, key)}" for key in keys]
    if shots:
        described.append(f"shots={0 if job.references is None else job.references.shots}")
    if peers:
        described.append(f"peers={0 if job.peers is None else job.peers.images}")
    return ", ".join(described)


def _scoring_options(job: JobConfig) -> dict[str, Any]:
    """Returns the options that determine the scores of given images."""
    without_effect = {"dataset", "output", "storage", "run_date", "timezone", "engine", "threshold"}
    document = job.model_dump(mode="json", exclude=without_effect)
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


def _parse_alternatives(assignment: str) -> tuple[str, list[str]]:
    key, separator, values = assignment.partition("=")
    if not separator or not key or not values:
        raise JobError(f"--compare {assignment}: write it as key=value,value, such as method.adaptation=none,mean")
    return key, _COMMA.split(values)
