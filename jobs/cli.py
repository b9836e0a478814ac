"""The command line: thin commands over the jobs, one place for exit codes and errors."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from jobs import logs
from jobs.logs import LogFormat
from pipeline.storage import open_store
from schemas.job import JobConfig, JobError, Storage, parse_job, read_job_yaml

EXIT_OK, EXIT_ERRORS, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

logger = logging.getLogger(__name__)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Nightly, distributed, zero-shot visual inspection: a bucket of photos in, scores and masks out.",
)

JobFile = Annotated[str | None, typer.Argument(metavar="[JOB]", help="Job file (YAML): a path or a URI.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the job.")]
Images = Annotated[str | None, typer.Option(help="Folder, table or URI of the images.")]
Output = Annotated[str | None, typer.Option(help="Folder or URI for the results.")]
Layout = Annotated[str | None, typer.Option(help="auto, folders, flat, mvtec, visa or table.")]
ClassName = Annotated[str | None, typer.Option("--class", help="Class of all images (layout flat).")]
Llm = Annotated[str | None, typer.Option(help="litellm model that describes classes.")]
Model = Annotated[str | None, typer.Option(help="open_clip model, as NAME or NAME/PRETRAINED.")]
RunDate = Annotated[str | None, typer.Option(help="The night, YYYY-MM-DD; default: today, UTC.")]

_log_format = LogFormat.TEXT


@app.callback()
def options(
    log_format: Annotated[
        LogFormat, typer.Option(envvar="ALFA_LOG_FORMAT", help="json: one object a line, and no tables in a job's log.")
    ] = LogFormat.TEXT,
) -> None:
    """Options of every command."""
    global _log_format
    _log_format = log_format
    logs.configure(log_format)


@app.command()
def score(
    job: JobFile = None,
    images: Images = None,
    output: Output = None,
    layout: Layout = None,
    class_name: ClassName = None,
    llm: Llm = None,
    model: Model = None,
    run_date: RunDate = None,
    overrides: Set = None,
) -> None:
    """Score a night's images and publish the results. Run again, it resumes."""
    from jobs.score import run_score

    config = _load(job, overrides, images, output, layout, class_name, llm, model, run_date)
    # A cluster writes stdout and stderr into one log.
    console = Console(quiet=True, force_terminal=False) if _log_format is LogFormat.JSON else _console()
    _run(lambda: run_score(config, console))


@app.command()
def submit(
    job: JobFile = None,
    images: Images = None,
    output: Output = None,
    layout: Layout = None,
    class_name: ClassName = None,
    llm: Llm = None,
    model: Model = None,
    run_date: RunDate = None,
    overrides: Set = None,
    address: Annotated[str | None, typer.Option(help="Ray head, http://HOST:8265; default: RAY_ADDRESS.")] = None,
    upload: Annotated[bool, typer.Option(help="Send this code along, or use what the nodes have installed.")] = True,
    wait: Annotated[bool, typer.Option(help="Follow the log and pass the job's exit code on.")] = True,
    again: Annotated[bool, typer.Option("--again", help="Submit a night that has succeeded once more.")] = False,
) -> None:
    """Score a night on a Ray cluster, as a job of its own. Submitted twice, it runs once."""
    from jobs.submit import run_submit

    config = _load(job, overrides, images, output, layout, class_name, llm, model, run_date)
    options = {"upload": upload, "wait": wait, "again": again}
    _run(lambda: run_submit(config, address, _console(), _log_format, **options))


@app.command()
def prompts(
    job: JobFile = None,
    images: Images = None,
    output: Output = None,
    layout: Layout = None,
    class_name: ClassName = None,
    llm: Llm = None,
    model: Model = None,
    overrides: Set = None,
) -> None:
    """Make, show and check the prompts of a job's classes; no image is scored."""
    from jobs.prompts import run_prompts

    config = _load(job, overrides, images, output, layout, class_name, llm, model, None)
    _run(lambda: run_prompts(config, _console()))


@app.command()
def check(
    job: JobFile = None,
    images: Images = None,
    output: Output = None,
    layout: Layout = None,
    class_name: ClassName = None,
    llm: Llm = None,
    model: Model = None,
    overrides: Set = None,
) -> None:
    """Try everything that the job needs: stores, weights, LLM key, cluster."""
    from jobs.check import run_check

    config = _load(job, overrides, images, output, layout, class_name, llm, model, None)
    _run(lambda: run_check(config, _console()))


@app.command()
def evaluate(
    job: JobFile = None,
    images: Images = None,
    output: Output = None,
    layout: Layout = None,
    class_name: ClassName = None,
    llm: Llm = None,
    model: Model = None,
    run: Annotated[str | None, typer.Option(help="A finished run in --output, instead of scoring.")] = None,
    compare: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2", help="Score in these ways too, such as method.aligner=raw.")
    ] = None,
    shots: Annotated[
        str | None, typer.Option(metavar="K1,K2", help="Compare with so many known-good images a class, too: 0,1,2,4.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A paper's setting: mvtec or visa.")] = None,
    overrides: Set = None,
) -> None:
    """Measure scores and maps against ground truth: AUROC, AUPR, F1-max, PRO.

    Several keys in one --compare "K1=a,b K2=c,d" are tried in all combinations; several --compare one after another.
    """
    from jobs import evaluate as evaluation

    if run is not None:
        if preset or compare or shots or images or job or not output:
            _refuse("--run wants --output, and takes neither a job, --images, --compare, --shots nor --preset")
        config = _parsed(lambda: evaluation.read_run_job(str(output), run, overrides or ()))
        _run(lambda: evaluation.run_evaluate_run(config, run, _console()))
    benchmark = next((known for known in evaluation.PRESETS if known == preset), None)
    if preset is not None and benchmark is None:
        _refuse(f"--preset {preset}: known are {', '.join(evaluation.PRESETS)}")
    defaults = dict(evaluation.PRESETS[benchmark]) if benchmark else {}
    if model or any(item.startswith("model.name=") for item in overrides or ()):
        defaults.pop("model", None)  # weights and size belong to the preset's model
    config = _load(job, overrides, images, output, layout, class_name, llm, model, None, defaults)
    if shots and not re.fullmatch(r"\d+(,\d+)*", shots):
        _refuse(f"--shots {shots}: write it as numbers with commas between, such as 0,1,2,4")
    counts = [int(count) for count in shots.split(",")] if shots else []
    _run(lambda: evaluation.run_evaluate(config, compare or (), counts, benchmark, _console()))


@app.command()
def status(
    output: Annotated[str, typer.Argument(help="Output folder or URI of the jobs.")],
    endpoint: Annotated[str | None, typer.Option(help="S3 endpoint; default: AWS_ENDPOINT_URL.")] = None,
) -> None:
    """Show the runs of an output: progress, errors, what is published."""
    from jobs.status import print_status

    _run(lambda: print_status(open_store(output, Storage(endpoint_url=endpoint)), _console()))


@app.command()
def report(
    output: Annotated[str, typer.Argument(help="Output folder or URI of the jobs.")],
    run_id: Annotated[str | None, typer.Argument(metavar="[RUN_ID]", help="Default: the last night's run.")] = None,
    run_date: Annotated[str | None, typer.Option(help="The night, YYYY-MM-DD.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="S3 endpoint; default: AWS_ENDPOINT_URL.")] = None,
) -> None:
    """Render the report of a published night anew."""
    from jobs.report import run_report

    _run(lambda: run_report(open_store(output, Storage(endpoint_url=endpoint)), run_id, run_date, _console()))


@app.command()
def gc(
    output: Annotated[str, typer.Argument(help="Output folder or URI of the jobs.")],
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove the files; without it they are only counted.")
    ] = False,
    older_than: Annotated[float, typer.Option(min=1, help="Hours for which a file must have lain untouched.")] = 24,
    endpoint: Annotated[str | None, typer.Option(help="S3 endpoint; default: AWS_ENDPOINT_URL.")] = None,
) -> None:
    """Remove what no commit refers to: superseded versions, masks and shards; those of unfinished runs, too."""
    from jobs.gc import run_gc

    _run(lambda: run_gc(open_store(output, Storage(endpoint_url=endpoint)), _console(), older_than, delete))


@app.command()
def schema(
    dialect: Annotated[str, typer.Option(help="athena, spark or duckdb.")],
    output: Annotated[
        str, typer.Option(help="Output folder or URI of the jobs: where the table is.")
    ] = "s3://bucket/lake",
) -> None:
    """Print the DDL of the scores table."""
    from pipeline.ddl import DIALECTS, render_ddl

    if dialect not in DIALECTS:
        _complain(f"--dialect {dialect}: allowed are {', '.join(DIALECTS)}")
        raise typer.Exit(EXIT_USAGE)
    typer.echo(render_ddl(dialect, output), nl=False)


@app.command()
def export(
    output: Annotated[str, typer.Argument(help="Output folder or URI of the jobs.")],
    run: Annotated[str, typer.Argument(help="A night (YYYY-MM-DD) or the id of the run that it belongs to.")],
    to: Annotated[str, typer.Option(help="coco, fiftyone or labelstudio.")],
    target: Annotated[
        str | None, typer.Option("--output", help="Folder or URI; default: exports/<run>/<format> in the output.")
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="S3 endpoint; default: AWS_ENDPOINT_URL.")] = None,
) -> None:
    """Write a published night for annotation and dataset tools."""
    from jobs.export import run_export
    from pipeline.exports import FORMATS

    if to not in FORMATS:
        _complain(f"--to {to}: allowed are {', '.join(FORMATS)}")
        raise typer.Exit(EXIT_USAGE)
    storage = Storage(endpoint_url=endpoint)
    _run(lambda: run_export(open_store(output, storage), run, to, target, storage, _console()))


@app.command()
def diff(
    output: Annotated[str, typer.Argument(help="Output folder or URI of the jobs.")],
    before: Annotated[str | None, typer.Argument(metavar="[NIGHT_A]", help="Default: the one before NIGHT_B.")] = None,
    after: Annotated[str | None, typer.Argument(metavar="[NIGHT_B]", help="Default: the last published.")] = None,
    psi: Annotated[float, typer.Option(help="PSI from which a class's scores count as shifted.")] = 0.25,
    fail_on_drift: Annotated[bool, typer.Option("--fail-on-drift", help="Exit with 1 where a class drifts.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all of it as JSON.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="S3 endpoint; default: AWS_ENDPOINT_URL.")] = None,
) -> None:
    """Compare two nights: what is newly anomalous, whether scores drift, how runs go."""
    from jobs.diff import run_diff

    store = open_store(output, Storage(endpoint_url=endpoint))
    options: dict[str, Any] = {"psi": psi, "fail_on_drift": fail_on_drift, "json_file": json_file}
    _run(lambda: run_diff(store, before, after, _console(), **options))


@app.command()
def calibrate(
    output: Annotated[str, typer.Argument(help="Output folder or URI of the runs.")],
    run_ids: Annotated[list[str], typer.Argument(metavar="RUN...", help="Ids of finished runs, as status shows them.")],
    table: Annotated[str, typer.Option(help="Path or URI of the JSON file to write.")],
    by: Annotated[str, typer.Option(help="f1_max, or fpr=RATE: a wanted false-positive rate.")] = "f1_max",
    all_good: Annotated[bool, typer.Option("--all-good", help="The runs' images are known to be good.")] = False,
    endpoint: Annotated[str | None, typer.Option(help="S3 endpoint; default: AWS_ENDPOINT_URL.")] = None,
) -> None:
    """Set thresholds by the scores of finished runs, for jobs to name."""
    from jobs.calibrate import run_calibrate

    storage = Storage(endpoint_url=endpoint)
    store = open_store(output, storage)
    _run(lambda: run_calibrate(store, run_ids, table, by, all_good=all_good, storage=storage, console=_console()))


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Folder for the results.")] = "out/demo",
) -> None:
    """Score the images of the repository with the embedded model, offline."""
    from jobs.demo import run_demo

    _run(lambda: run_demo(output, _console()))


def main() -> None:
    """Entry point of `alfa`."""
    # A cluster stops a job with SIGTERM; it ends as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except Exception:
        logger.critical("a fault in alfa itself; please report it with what follows", exc_info=True)
        sys.exit(EXIT_ERRORS)


def _load(
    job: str | None,
    overrides: list[str] | None,
    images: str | None,
    output: str | None,
    layout: str | None,
    class_name: str | None,
    llm: str | None,
    model: str | None,
    run_date: str | None,
    defaults: Mapping[str, Any] | None = None,
) -> JobConfig:
    """defaults: sections of a job for where its file has none."""
    name, _, pretrained = (model or "").partition("/")
    flags: dict[str, Any] = {
        "dataset.images": images,
        "dataset.layout": layout,
        "dataset.class_name": class_name,
        "output.uri": output,
        "prompts.llm": llm,
        "model.name": name or None,
        "model.pretrained": pretrained or None,
        "run_date": run_date,
    }

    def parse() -> JobConfig:
        document = read_job_yaml(_read_job(job)) if job else {}
        return parse_job({**(defaults or {}), **document}, overrides or (), flags)

    return _parsed(parse)


def _parsed(parse: Callable[[], JobConfig]) -> JobConfig:
    try:
        return parse()
    except JobError as error:
        _refuse(str(error))


def _refuse(fault: str) -> NoReturn:
    for line in fault.splitlines():
        _complain(line)
    raise typer.Exit(EXIT_USAGE) from None


def _read_job(location: str) -> str:
    try:
        if "://" in location:
            folder, _, name = location.rpartition("/")
            return open_store(folder, Storage()).read(name).decode()
        return Path(location).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"the job file {location} cannot be read: {error}") from None


def _run(job: Callable[[], int]) -> None:
    """Runs a job; what the pipeline raises becomes one clear line and an exit code."""
    from jobs.demo import DemoError
    from jobs.diff import NightError
    from pipeline.alfa import ModelError
    from pipeline.claims import ClaimLostError
    from pipeline.engine import EngineError
    from pipeline.exports import ExportError
    from pipeline.iceberg import LakeError
    from pipeline.images import DatasetError
    from pipeline.prompts import LLMError, PromptLibraryError
    from pipeline.report import ReportError
    from pipeline.thresholds import ThresholdError

    refusals = (
        *(JobError, DatasetError, ModelError, PromptLibraryError),
        *(DemoError, ExportError, LakeError, NightError, ReportError, ThresholdError),
    )
    try:
        code = job()
    except KeyboardInterrupt:
        _complain("stopped; finished shards are kept. Run the same command again to resume")
        code = EXIT_INTERRUPTED
    except refusals as error:
        _complain(str(error))
        code = EXIT_USAGE
    except (EngineError, LLMError, ClaimLostError, OSError) as error:
        _complain(f"{error}")
        _complain("what was finished is kept; run the same command again to resume")
        code = EXIT_ERRORS
    raise typer.Exit(code)


def _complain(line: str) -> None:
    if _log_format is LogFormat.JSON:
        logger.error(line)
        return
    text = f"alfa: {logs.redact_lines(line)}"
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True, style="red")


def _console() -> Console:
    """A log or a pipe has no width; tables get more than a terminal's 80 columns there."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


if __name__ == "__main__":
    main()
