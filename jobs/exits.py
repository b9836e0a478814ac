"""How a command ends: its exit code, and an error as one clear line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NoReturn

import typer
from rich.console import Console

from jobs import logs
from jobs.logs import LogFormat
from schemas.job import JobError

ERRORS, USAGE, INTERRUPTED = 1, 2, 130

logger = logging.getLogger(__name__)


def run(job: Callable[[], int]) -> NoReturn:
    """Runs a job and exits with what it returns; what the pipeline raises becomes one clear line and an exit code."""
    from jobs.demo import DemoError
    from jobs.diff import NightError
    from pipeline.alfa import ModelError
    from pipeline.engine import EngineError
    from pipeline.images import DatasetError
    from pipeline.lake import ExportError, LakeError
    from pipeline.prompts import LLMError, PromptLibraryError
    from pipeline.report import ReportError
    from pipeline.scoring import ThresholdError
    from pipeline.storage import AddressError, LeaseLostError

    logs.adopt_libraries()
    refusals = (
        *(AddressError, JobError, DatasetError, ModelError, PromptLibraryError),
        *(DemoError, ExportError, LakeError, NightError, ReportError, ThresholdError),
    )
    try:
        code = job()
    except KeyboardInterrupt:
        _complain("stopped; finished shards are kept. Run the same command again to resume")
        code = INTERRUPTED
    except refusals as error:
        refuse(str(error))
    except (EngineError, LLMError, LeaseLostError, OSError) as error:
        _complain(f"{error}")
        _complain("what was finished is kept; run the same command again to resume")
        code = ERRORS
    raise typer.Exit(code)


def refuse(fault: str) -> NoReturn:
    """Exits as one does who was asked for what cannot be done. fault: one line for each thing that is wrong."""
    for line in fault.splitlines():
        _complain(line)
    raise typer.Exit(USAGE) from None


def _complain(line: str) -> None:
    if logs.current_format() is LogFormat.JSON:
        logger.error(line)
        return
    text = f"alfa: {logs.redact_lines(line)}"
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True, style="red")
