"""`alfa check`: tries everything that a night needs, before the night."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.text import Text

from jobs.console import print_json
from pipeline.alfa import load_encoder, locate_weights
from pipeline.engine import (
    can_grow,
    connect,
    describe_nodes,
    is_local,
    list_nodes,
    plan_actors,
    require_room,
    uses_gpus,
)
from pipeline.images import list_images, open_dataset
from pipeline.lake import open_catalog
from pipeline.prompts import require_askable, try_model
from pipeline.storage import open_store, redact
from schemas.job import EMBEDDED_NOTE, JobConfig


class CheckError(RuntimeError):
    """A check has failed; the message says what to do."""


@dataclass(frozen=True)
class Check:
    """The outcome of a check. detail: what was found, or why it failed and what to do."""

    name: str
    passed: bool
    detail: str


def run_check(job: JobConfig, console: Console, *, ask: bool = False, as_json: bool = False) -> int:
    """Runs all checks, even after one has failed, and prints their outcomes. Returns 0, or 2 if one failed.

    ask: also put one tiny question to the LLM.
    """
    checks = []
    for check in _run_checks(job, ask):
        checks.append(check)
        if not as_json:
            mark = Text("ok  ", "green") if check.passed else Text("FAIL", "red")
            console.print(Text.assemble(mark, f"  {check.name}: {check.detail}"), soft_wrap=True)
    passed = all(check.passed for check in checks)
    if as_json:
        print_json({"passed": passed, "checks": [asdict(check) for check in checks]})
    return 0 if passed else 2


def _run_checks(job: JobConfig, ask: bool) -> Iterator[Check]:
    checks: dict[str, Callable[[JobConfig], str]] = {
        "images readable": _check_images,
        "output writable": _check_output,
        "create-only writes": _check_create,
        "weights loadable": _check_weights,
        "LLM": _ask_llm if ask else _check_llm,
        "cluster": _check_cluster,
    }
    if job.lake.format == "iceberg":
        checks["Iceberg catalog"] = _check_catalog
    for name, check in checks.items():
        try:
            yield Check(name, True, check(job))
        except Exception as error:  # any failure: the other checks must still run
            yield Check(name, False, redact(f"{error}" or type(error).__name__))


def _check_images(job: JobConfig) -> str:
    source = open_dataset(job.dataset, job.storage, open_store(job.output.uri, job.storage))
    batch = next(list_images(source), None)
    if batch is None:
        raise CheckError(f"the table {job.dataset.images} has no rows")
    first = batch.slice(0, 1).to_pylist()[0]
    size = len(source.store.read_uri(first["uri"]))
    return f"layout {source.layout}; read {first['uri']} ({size} bytes)"


def _check_output(job: JobConfig) -> str:
    output = open_store(job.output.uri, job.storage)
    key = f"checks/{uuid.uuid4().hex}"
    output.write(key, b"alfa")
    if output.read(key) != b"alfa":
        raise CheckError(f"{output.uri(key)} does not hold what was just written to it")
    output.delete(key)
    return output.uri("")


def _check_create(job: JobConfig) -> str:
    output = open_store(job.output.uri, job.storage)
    key = f"checks/{uuid.uuid4().hex}"
    try:
        first, second = output.create(key, b"first"), output.create(key, b"second")
        version = output.version(key)
        output.write(key, b"third")
        conditional = not output.replace(key, b"fourth", version)
    finally:
        output.delete(key)
    if not first or second:
        raise CheckError(
            "the store ignores create-only writes (If-None-Match), so an LLM might be asked twice for a class; use a "
            "store that honours them, such as S3, SeaweedFS, MinIO, GCS or a local disk"
        )
    if not conditional:
        return "honoured; conditional replaces (If-Match) are not, so only leases keep two jobs from publishing a night"
    return "honoured, and so are conditional replaces"


def _check_weights(job: JobConfig) -> str:
    weights = locate_weights(job.model)
    encoder = load_encoder(job.model, weights)
    height, width = encoder.preprocess.size
    note = f"; {EMBEDDED_NOTE}" if weights.is_embedded else ""
    return f"{weights.label}, {width}x{height} px, SHA-256 {weights.sha256[:12]}{note}"


def _check_llm(job: JobConfig) -> str:
    if not job.prompts.asks_llm:
        return "none configured: known classes get bundled prompts, others the base ensemble"
    require_askable(job.prompts)
    key = "its server may want a key" if job.prompts.api_base else "key present"
    return f"{job.prompts.llm}, {key}; not asked (use --ask to ask it)"


def _ask_llm(job: JobConfig) -> str:
    if not job.prompts.asks_llm:
        return _check_llm(job)
    return f"{job.prompts.llm} answers {try_model(job.prompts)!r}"


def _check_catalog(job: JobConfig) -> str:
    catalog = open_catalog(job)
    return f"{job.lake.catalog or 'embedded'}, namespaces: {len(catalog.list_namespaces())}"


def _check_cluster(job: JobConfig) -> str:
    with connect(job):
        nodes, grows = list_nodes(), can_grow(job)
        plan = plan_actors(job, nodes, uses_gpus(job, nodes, grows))
        if is_local(job):
            require_room(job, plan, nodes)
    if not plan.count:
        wait = f"the night waits {job.engine.wait_for_nodes_s:g} s for one"
        return f"no node has room for a scoring actor yet ({describe_nodes(nodes)}); {wait}"
    where = f"{plan.count} on GPUs" if plan.gpus else f"{plan.count} on CPU, {plan.cpus} cores each"
    here = "a GPU" if torch.cuda.is_available() else "no GPU"
    return f"scoring actors: {where}; this machine has {here}"
