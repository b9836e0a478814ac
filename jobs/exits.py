"""Ends a command: with its exit code, and an error as one clear line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NoReturn

import typer
from rich.console import Console

from jobs import logs
from jobs.logs import LogFormat
from pipeline.storage import AddressError
from schemas.job import JobError
from schemas.records import RecordError

ERRORS, USAGE, INTERRUPTED = 1, 2, 130

logger = logging.getLogger(__name__)


def run(job: Callable[[], int]) -> NoReturn:
    """Runs a job and exits with its code, see attempt."""
    raise typer.Exit(attempt(job))


def attempt(job: Callable[[], int]) -> int:
    """Runs a job and returns its exit code.

    The pipeline's errors are printed as one clear line. The exit code is then 2 if the job has to change, 1 if the same
    command can succeed later, and 130 if it was interrupted. Other exceptions are faults in alfa and are raised.
    """
    logs.adopt_libraries()
    try:
        return job()
    except KeyboardInterrupt:
        _complain("stopped; finished shards are kept. Run the same command again to resume")
        return INTERRUPTED
    except (AddressError, JobError, RecordError) as error:
        return _complain_of(str(error))
    except OSError as error:
        return _give_up(error)
    except Exception as error:
        refusals, failures = _errors_of_the_pipeline()
        if isinstance(error, refusals):
            return _complain_of(str(error))
        if not isinstance(error, failures):
            raise
        return _give_up(error)


def refuse(fault: str) -> NoReturn:
    """Exits with the code for bad usage. fault: what is wrong, one line per fault."""
    raise typer.Exit(_complain_of(fault)) from None


def _complain_of(fault: str) -> int:
    for line in fault.splitlines():
        _complain(line)
    return USAGE


def _errors_of_the_pipeline() -> tuple[tuple[type[Exception], ...], tuple[type[Exception], ...]]:
    """Returns the errors after which the job has to change, and those after which the same command can succeed.

    They are imported only when an error is met, because they bring torch and Ray, whose import takes seconds.
    """
    from jobs.demo import DemoError
    from jobs.diff import NightError
    from pipeline.alfa import ModelError
    from pipeline.engine import EngineError
    from pipeline.images import DatasetError
    from pipeline.lake import ExportError, LakeError
    from pipeline.prompts import LLMError, PromptLibraryError
    from pipeline.report import ReportError
    from pipeline.scoring import ThresholdError
    from pipeline.storage import LeaseLostError

    of_job = (DatasetError, ModelError, PromptLibraryError, ThresholdError)
    of_command = (DemoError, ExportError, LakeError, NightError, ReportError)
    return (*of_job, *of_command), (EngineError, LLMError, LeaseLostError)


def _give_up(error: Exception) -> int:
    _complain(f"{error}")
    _complain("run the same command again to resume; nothing that has finished is done twice")
    return ERRORS


def _complain(line: str) -> None:
    if logs.current_format() is LogFormat.JSON:
        logger.error(line)
        return
    text = f"alfa: {logs.redact_lines(line)}"
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True, style="red")
