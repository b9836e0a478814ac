"""`alfa prompts`: makes, shows and checks the prompts of a job's classes without scoring an image."""

from __future__ import annotations

import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.markup import escape

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
    """Obtains every class's prompt set (an LLM is asked only for those that have none) and prints what CLIP will read.

    Returns the exit code. Raises LLMError, PromptLibraryError, DatasetError.
    """
    output = open_store(job.output.uri, job.storage)
    source = open_dataset(job.dataset, job.storage)
    with tempfile.TemporaryDirectory(prefix="alfa-") as scratch:
        classes = list(write_manifest(list_images(source), Path(scratch)).classes)
    owner, lease_s = leases.new_owner(), job.engine.lease_s
    with ThreadPoolExecutor(_CALLS_AT_ONCE) as pool:
        sets = list(pool.map(lambda name: obtain(output, name, job.prompts, owner=owner, lease_s=lease_s), classes))
    fits = text_fits(job.model)
    for prompt_set in sets:
        _show(prompt_set, compose_ensemble(prompt_set, fits), console)
    calls = sum(item.usage.calls for item in sets)
    console.print(f"{len(sets)} classes; {calls} LLM calls are recorded in their stored sets", highlight=False)
    console.print(f"edit them below {escape(output.uri('prompts'))}; an edit is used by the next run", soft_wrap=True)
    return 0


def _show(prompt_set: PromptSet, ensemble: PromptEnsemble, console: Console) -> None:
    sides = [prompt.side for prompt in ensemble.prompts]
    source = f"{prompt_set.source}, {prompt_set.model}" if prompt_set.model else prompt_set.source
    console.print(
        f"\n[bold]{escape(prompt_set.class_name)}[/bold]  source {escape(source)}, recipe {prompt_set.recipe}, "
        f"{sides.count('normal')} normal and {sides.count('anomalous')} anomalous prompts",
        highlight=False,
        soft_wrap=True,
    )
    if prompt_set.description is None:
        console.print("  only the base ensemble: no LLM is configured and the bundled pack does not know this class")
        return
    for phrase in prompt_set.description.normal:
        console.print(f"  normal   {escape(phrase)}", highlight=False, soft_wrap=True)
    for defect in prompt_set.description.defects:
        console.print(f"  defect   {escape(defect.name)}: {escape(defect.look)}", highlight=False, soft_wrap=True)
