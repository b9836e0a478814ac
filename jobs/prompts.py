"""`alfa prompts`: makes, shows and checks the prompts of a job's classes, without scoring an image."""

from __future__ import annotations

import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.text import Text

from jobs.console import print_line
from pipeline.alfa import text_fits
from pipeline.images import list_images, open_dataset
from pipeline.prompts import compose_ensemble, obtain
from pipeline.scoring import write_manifest
from pipeline.storage import leases, open_store
from schemas.job import JobConfig
from schemas.prompts import PromptEnsemble, PromptSet

logger = logging.getLogger(__name__)

_CALLS_AT_ONCE = 8


def run_prompts(job: JobConfig, console: Console) -> int:
    """Obtains the prompt set of every class and prints it. Returns the exit code.

    An LLM is asked only for classes that have no set yet. Raises LLMError, PromptLibraryError and DatasetError.
    """
    output = open_store(job.output.uri, job.storage)
    source = open_dataset(job.dataset, job.storage, output)
    with tempfile.TemporaryDirectory(prefix="alfa-") as scratch:
        classes = list(write_manifest(list_images(source), Path(scratch)).classes)
    owner, lease_s = leases.new_owner(), job.engine.lease_s
    with ThreadPoolExecutor(_CALLS_AT_ONCE) as pool:
        sets = list(pool.map(lambda name: obtain(output, name, job.prompts, owner=owner, lease_s=lease_s), classes))
    fits = text_fits(job.model)
    for prompt_set in sets:
        _show(prompt_set, compose_ensemble(prompt_set, fits), console)
    calls = sum(item.usage.calls for item in sets)
    print_line(console, f"{len(sets)} classes; {calls} LLM calls have been made for their prompt sets so far")
    print_line(console, f"the sets are files below {output.uri('prompts')}; the next run uses them as you edit them")
    return 0


def _show(prompt_set: PromptSet, ensemble: PromptEnsemble, console: Console) -> None:
    sides = [prompt.side for prompt in ensemble.prompts]
    source = f"{prompt_set.source}, {prompt_set.model}" if prompt_set.model else prompt_set.source
    counts = f"{sides.count('normal')} normal and {sides.count('anomalous')} anomalous prompts"
    facts = f"  source {source}, recipe {prompt_set.recipe}, {counts}"
    console.print(Text.assemble("\n", (prompt_set.class_name, "bold"), facts), soft_wrap=True)
    if prompt_set.description is None:
        print_line(console, "  only the base ensemble: no LLM is configured, and this class has no bundled prompts")
        return
    for phrase in prompt_set.description.normal:
        print_line(console, f"  normal   {phrase}")
    for defect in prompt_set.description.defects:
        print_line(console, f"  defect   {defect.name}: {defect.look}")
