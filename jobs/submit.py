"""`alfa submit`: runs a night as a job of a Ray cluster, or joins the job if it is submitted already.

The job is read on this machine and travels as `--set` options of `alfa score`. So the cluster needs no job file, and
the command that Ray's dashboard shows is the whole job. The night is fixed here too: a job that waits in the cluster
past midnight still scores the night that it was submitted for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.console import Console
from tenacity import retry, retry_if_exception, stop_after_delay, wait_exponential

from jobs.logs import LogFormat
from pipeline.engine import EngineError
from schemas.job import JobConfig
from schemas.text import one_line

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[1]
_CODE = ("schemas", "pipeline", "jobs")
_POLL_S = 1.0
_ANSWER_S = 60.0
"""How long the head may take for the answer to one request."""
_HEAD_SILENT_S = 120.0
"""How long the head may stay silent before alfa stops following the job."""


def _is_transient(error: BaseException) -> bool:
    """Whether a request is worth another try: the head does not answer, or its agent has not started yet."""
    return isinstance(error, OSError) or "No available agent" in str(error)


_patiently = retry(
    retry=retry_if_exception(_is_transient),
    wait=wait_exponential(multiplier=0.5, max=10.0),
    stop=stop_after_delay(_HEAD_SILENT_S),
    reraise=True,
)


class _Client(JobSubmissionClient):
    """Ray's client with a time-out: by itself it waits forever for a head that accepts a request without answering."""

    def _do_request(self, *arguments: Any, **options: Any) -> Any:
        return super()._do_request(*arguments, **{"timeout": _ANSWER_S, **options})


def run_submit(
    job: JobConfig,
    address: str | None,
    console: Console,
    log_format: LogFormat,
    *,
    upload: bool,
    wait: bool,
    again: bool = False,
) -> int:
    """Submits the night, or joins its running job, and follows its log. Returns the job's exit code.

    Args:
        job: the night.
        address: address of the head's job server, such as http://head:8265; None: RAY_API_SERVER_ADDRESS or
            RAY_ADDRESS.
        log_format: log format of the job.
        upload: upload the code of this machine; without it, the nodes need `alfa` installed.
        wait: follow the log; without it, return 0 as soon as the job is accepted.
        again: also submit a night that has succeeded already.

    Raises EngineError where the cluster refuses the job, OSError where it does not answer.
    """
    job = _with_absolute_paths(job)
    client = _connect(address)
    entrypoint = entrypoint_of(job, log_format, upload=upload)
    submission_id, status = find_or_submit(client, submission_id_of(job), entrypoint, upload=upload, again=again)
    console.print(submission_id, markup=False, highlight=False)
    if status is JobStatus.SUCCEEDED:
        logger.info("this night's job has succeeded already; use --again if photos or prompts have changed since")
        return 0
    if not wait:
        return 0
    try:
        return _exit_code(follow(client, submission_id))
    except KeyboardInterrupt:
        logger.warning(
            "no longer following; the job goes on. `alfa submit` with the same job follows it again, "
            "`ray job stop %s` stops it",
            submission_id,
        )
        return 130


def submission_id_of(job: JobConfig) -> str:
    """Names the night's job: alfa-<run_date>-<12 hex digits>.

    The digits hash what determines the run, as far as it is known before the night: the name of the weights, the
    settings of the prompts, and the output. Options of the engine do not count.
    """
    settings = [part.model_dump_json() for part in (job.output, job.storage, job.prompts)]
    return f"alfa-{job.run_date}-{job.result_fingerprint(job.model.pretrained or '', ''.join(settings))}"


def entrypoint_of(job: JobConfig, log_format: LogFormat = LogFormat.TEXT, *, upload: bool) -> str:
    """Returns the shell command that scores the job on the cluster. Keys with default values are left out.

    upload: whether the code is uploaded. A job holds no credentials (schemas.job refuses them), so none reach Ray's
    metadata.
    """
    keys = job.model_dump(mode="json", exclude_defaults=True, exclude={"run_date": True, "engine": {"address"}})
    sets = [part for key, value in _flatten(keys) for part in ("--set", f"{key}={_as_yaml(value)}")]
    command = ["python", "-m", "jobs"] if upload else ["alfa"]
    if log_format is not LogFormat.TEXT:
        command += ["--log-format", log_format.value]
    return shlex.join([*command, "score", "--run-date", str(job.run_date), *sets])


def copy_code(folder: Path) -> None:
    """Copies the code that a submission uploads into a folder: alfa's packages with the embedded model."""
    for name in _CODE:
        shutil.copytree(_ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def _flatten(keys: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in keys.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _as_yaml(value: Any) -> str:
    """Writes a value so that YAML reads it back: as a bare string if that works, else as JSON, which is valid YAML."""
    if isinstance(value, str):
        try:
            if yaml.safe_load(value) == value:
                return value
        except yaml.YAMLError:
            pass
    return json.dumps(value, ensure_ascii=False)


def _with_absolute_paths(job: JobConfig) -> JobConfig:
    """Makes the job's local paths absolute, because the cluster runs the job in another folder."""
    pretrained = job.model.pretrained
    weights = str(Path(pretrained).resolve()) if pretrained and Path(pretrained).exists() else pretrained
    return job.model_copy(
        update={
            "dataset": job.dataset.model_copy(update={"images": _absolute(job.dataset.images)}),
            "output": job.output.model_copy(update={"uri": _absolute(job.output.uri)}),
            "model": job.model.model_copy(update={"pretrained": weights}),
        }
    )


def _absolute(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).resolve())


def _connect(address: str | None) -> JobSubmissionClient:
    if address is not None:
        # Ray prefers its environment variables to an argument, and this variable to the others.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
    try:
        return _Client(address)
    except AuthenticationError:
        raise EngineError(
            "the Ray head refuses a client without its token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the token that the head was started with"
        ) from None
    except (OSError, RuntimeError) as error:
        where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "the default"
        reason = one_line(str(error)).rstrip(".")
        raise EngineError(
            f"the Ray head at {where} cannot be used: {reason}; check that it runs, and that --address or RAY_ADDRESS "
            f"names its job server, such as http://head:8265"
        ) from None


def find_or_submit(
    client: JobSubmissionClient, first_id: str, entrypoint: str, *, upload: bool, again: bool
) -> tuple[str, JobStatus | None]:
    """Finds the night's job, or submits it. Returns its id and its status; None if this call submitted it.

    A job that has failed or was stopped gets a successor, whose id ends in -2, -3 and so on. upload, again: see
    run_submit. Raises EngineError where the cluster does not accept the job.
    """
    attempt = 1
    while True:
        submission_id = first_id + (f"-{attempt}" if attempt > 1 else "")
        status = _status_of(client, submission_id)
        if status is None:
            try:
                _patiently(_submit)(client, entrypoint, submission_id, upload=upload)
            except RuntimeError as error:
                if _status_of(client, submission_id) is None:
                    raise EngineError(f"the cluster did not accept the job: {error}") from None
                continue  # another client has submitted it in the meantime
            logger.info("submitted as %s", submission_id)
            return submission_id, None
        if not status.is_terminal():
            logger.info("%s is %s already; joining it", submission_id, status.lower())
            return submission_id, status
        if status is JobStatus.SUCCEEDED and not again:
            return submission_id, status
        logger.info("%s has %s", submission_id, status.lower())
        attempt += 1


def _status_of(client: JobSubmissionClient, submission_id: str) -> JobStatus | None:
    jobs = _patiently(client.list_jobs)()
    return next((JobStatus(item.status) for item in jobs if item.submission_id == submission_id), None)


def _submit(client: JobSubmissionClient, entrypoint: str, submission_id: str, *, upload: bool) -> None:
    if not upload:
        client.submit_job(entrypoint=entrypoint, submission_id=submission_id)
        return
    with tempfile.TemporaryDirectory(prefix="alfa-submit-") as folder:
        copy_code(Path(folder))
        client.submit_job(entrypoint=entrypoint, submission_id=submission_id, runtime_env={"working_dir": folder})


def follow(client: JobSubmissionClient, submission_id: str) -> JobDetails:
    """Prints the job's log as it grows, until the job has ended. Returns the details of the job.

    The head may be unreachable for a while. Raises EngineError where the head has lost the job, OSError where the head
    stays unreachable.
    """
    log = _Log(client, submission_id)
    while True:
        try:
            asyncio.run(log.print_rest())
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            logger.debug("the log broke off and is resumed: %s", error)
        info = _info(client, submission_id)
        if info.status.is_terminal():
            return info
        time.sleep(_POLL_S)


@dataclass
class _Log:
    """The log of a job. Ray sends it from its beginning on every request; each part is printed once."""

    client: JobSubmissionClient
    submission_id: str
    printed: int = 0
    """Characters printed so far."""

    async def print_rest(self) -> None:
        """Prints the new part of the log until the job or the connection ends."""
        sent = 0
        async for chunk in self.client.tail_job_logs(self.submission_id):
            new = chunk[max(0, self.printed - sent) :]
            sys.stdout.write(new)
            sys.stdout.flush()
            sent += len(chunk)
            self.printed = max(self.printed, sent)


def _info(client: JobSubmissionClient, submission_id: str) -> JobDetails:
    try:
        return _patiently(client.get_job_info)(submission_id)
    except RuntimeError as error:
        raise EngineError(f"the head no longer knows job {submission_id}; it was replaced ({error})") from None


def _exit_code(info: JobDetails) -> int:
    """Returns the exit code of `alfa score`: 128 + n where signal n ended it, 130 where the job was stopped."""
    if info.status is JobStatus.SUCCEEDED:
        return 0
    if info.status is JobStatus.STOPPED:
        logger.warning("the job was stopped; submit it again to resume")
        return 130
    code = info.driver_exit_code
    if code is None:
        logger.error("the job did not run: %s", info.message)
        return 1
    code = code if code >= 0 else 128 - code
    logger.error("the job ended with exit code %d%s", code, "; submit it again to resume" if code != 2 else "")
    return code
