"""The command line: thin commands over the jobs."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jobs import exits, logs
from jobs.flags import JobFlags, NightFlags, spread_flags
from jobs.logs import LogFormat
from pipeline.storage import Store, open_store
from schemas.job import Storage, without_credentials

logger = logging.getLogger(__name__)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Nightly, distributed, zero-shot visual inspection: a bucket of photos in, scores and masks out.",
)


def _check_endpoint(value: str | None) -> str | None:
    try:
        return value if value is None else without_credentials(value)
    except ValueError as error:
        exits.refuse(f"--endpoint {error}")


Output = Annotated[str, typer.Argument(help="Output folder or URI of the jobs.")]
Endpoint = Annotated[str | None, typer.Option(help="S3 endpoint; default: AWS_ENDPOINT_URL.", callback=_check_endpoint)]


@app.callback()
def options(
    log_format: Annotated[
        LogFormat, typer.Option(envvar="ALFA_LOG_FORMAT", help="json: one object a line, and no tables in a job's log.")
    ] = LogFormat.TEXT,
) -> None:
    """Options of every command."""
    logs.configure(log_format)


@app.command()
@spread_flags
def score(flags: NightFlags) -> None:
    """Score a night's images and publish the results. Run again, it resumes."""
    from jobs.score import run_score

    # A cluster writes stdout and stderr into one log.
    quiet = logs.current_format() is LogFormat.JSON
    console = Console(quiet=True, force_terminal=False) if quiet else _console()
    exits.run(lambda: run_score(flags.read_job(), console))


@app.command()
@spread_flags
def submit(
    flags: NightFlags,
    address: Annotated[str | None, typer.Option(help="Ray head, http://HOST:8265; default: RAY_ADDRESS.")] = None,
    upload: Annotated[bool, typer.Option(help="Send this code along, or use what the nodes have installed.")] = True,
    wait: Annotated[bool, typer.Option(help="Follow the log and pass the job's exit code on.")] = True,
    again: Annotated[bool, typer.Option("--again", help="Submit a night that has succeeded once more.")] = False,
) -> None:
    """Score a night on a Ray cluster, as a job of its own. Submitted twice, it runs once."""
    from jobs.submit import run_submit

    options = {"upload": upload, "wait": wait, "again": again}
    exits.run(lambda: run_submit(flags.read_job(), address, _console(), logs.current_format(), **options))


@app.command()
@spread_flags
def prompts(flags: JobFlags) -> None:
    """Make, show and check the prompts of a job's classes; no image is scored."""
    from jobs.prompts import run_prompts

    exits.run(lambda: run_prompts(flags.read_job(), _console()))


@app.command()
@spread_flags
def check(flags: JobFlags) -> None:
    """Try everything that the job needs: stores, weights, LLM key, cluster."""
    from jobs.check import run_check

    exits.run(lambda: run_check(flags.read_job(), _console()))


@app.command()
@spread_flags
def evaluate(
    flags: JobFlags,
    run: Annotated[str | None, typer.Option(help="A finished run in --output, instead of scoring.")] = None,
    compare: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2", help="Score in these ways too, such as method.aligner=raw.")
    ] = None,
    shots: Annotated[
        str | None, typer.Option(metavar="K1,K2", help="Compare with so many known-good images a class, too: 0,1,2,4.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A paper's setting: mvtec or visa.")] = None,
) -> None:
    """Measure scores and maps against ground truth: AUROC, AUPR, F1-max, PRO.

    Several keys in one --compare "K1=a,b K2=c,d" are tried in all combinations; several --compare one after another.
    """
    from jobs import evaluate as evaluation

    if run is not None:
        output, overrides = flags.output, flags.overrides or ()
        if preset or compare or shots or flags.images or flags.file or not output:
            exits.refuse("--run wants --output, and takes neither a job, --images, --compare, --shots nor --preset")
        exits.run(lambda: evaluation.run_evaluate_run(output, run, overrides, _console()))
    benchmark = next((known for known in evaluation.PRESETS if known == preset), None)
    if preset is not None and benchmark is None:
        exits.refuse(f"--preset {preset}: known are {', '.join(evaluation.PRESETS)}")
    if shots and not re.fullmatch(r"\d+(,\d+)*", shots):
        exits.refuse(f"--shots {shots}: write it as numbers with commas between, such as 0,1,2,4")
    counts = [int(count) for count in shots.split(",")] if shots else []
    defaults = dict(evaluation.PRESETS[benchmark]) if benchmark else {}
    if flags.model or any(item.startswith("model.name=") for item in flags.overrides or ()):
        defaults.pop("model", None)  # weights and size belong to the preset's model
    exits.run(lambda: evaluation.run_evaluate(flags.read_job(defaults), compare or (), counts, benchmark, _console()))


@app.command()
def status(
    output: Output,
    endpoint: Endpoint = None,
) -> None:
    """Show the runs of an output: progress, errors, what is published."""
    from jobs.status import print_status

    exits.run(lambda: print_status(_open(output, endpoint), _console()))


@app.command()
def report(
    output: Output,
    run_id: Annotated[str | None, typer.Argument(metavar="[RUN_ID]", help="Default: the last night's run.")] = None,
    run_date: Annotated[str | None, typer.Option(help="The night, YYYY-MM-DD.")] = None,
    endpoint: Endpoint = None,
) -> None:
    """Render the report of a published night anew."""
    from jobs.report import run_report

    exits.run(lambda: run_report(_open(output, endpoint), run_id, run_date, _console()))


@app.command()
def gc(
    output: Output,
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove the files; without it they are only counted.")
    ] = False,
    older_than: Annotated[float, typer.Option(min=1, help="Hours for which a file must have lain untouched.")] = 24,
    endpoint: Endpoint = None,
) -> None:
    """Remove what no commit refers to: superseded versions, masks and shards; those of unfinished runs, too."""
    from jobs.gc import run_gc

    exits.run(lambda: run_gc(_open(output, endpoint), _console(), older_than, delete))


@app.command()
def schema(
    dialect: Annotated[str, typer.Option(help="athena, spark or duckdb.")],
    output: Annotated[
        str, typer.Option(help="Output folder or URI of the jobs: where the table is.")
    ] = "s3://bucket/lake",
) -> None:
    """Print the DDL of the scores table."""
    from pipeline.lake import DIALECTS, render_ddl

    if dialect not in DIALECTS:
        exits.refuse(f"--dialect {dialect}: allowed are {', '.join(DIALECTS)}")
    typer.echo(render_ddl(dialect, output), nl=False)


@app.command()
def export(
    output: Output,
    run: Annotated[str, typer.Argument(help="A night (YYYY-MM-DD) or the id of the run that it belongs to.")],
    to: Annotated[str, typer.Option(help="coco, fiftyone or labelstudio.")],
    target: Annotated[
        str | None, typer.Option("--output", help="Folder or URI; default: exports/<run>/<format> in the output.")
    ] = None,
    endpoint: Endpoint = None,
) -> None:
    """Write a published night for annotation and dataset tools."""
    from jobs.export import run_export
    from pipeline.lake import FORMATS

    if to not in FORMATS:
        exits.refuse(f"--to {to}: allowed are {', '.join(FORMATS)}")
    storage = Storage(endpoint_url=endpoint)
    exits.run(lambda: run_export(_open(output, endpoint), run, to, target, storage, _console()))


@app.command()
def diff(
    output: Output,
    before: Annotated[str | None, typer.Argument(metavar="[NIGHT_A]", help="Default: the one before NIGHT_B.")] = None,
    after: Annotated[str | None, typer.Argument(metavar="[NIGHT_B]", help="Default: the last published.")] = None,
    psi: Annotated[float, typer.Option(help="PSI from which a class's scores count as shifted.")] = 0.25,
    fail_on_drift: Annotated[bool, typer.Option("--fail-on-drift", help="Exit with 1 where a class drifts.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all of it as JSON.")] = None,
    endpoint: Endpoint = None,
) -> None:
    """Compare two nights: what is newly anomalous, whether scores drift, how runs go."""
    from jobs.diff import run_diff

    options: dict[str, Any] = {"psi": psi, "fail_on_drift": fail_on_drift, "json_file": json_file}
    exits.run(lambda: run_diff(_open(output, endpoint), before, after, _console(), **options))


@app.command()
def calibrate(
    output: Annotated[str, typer.Argument(help="Output folder or URI of the runs.")],
    run_ids: Annotated[list[str], typer.Argument(metavar="RUN...", help="Ids of finished runs, as status shows them.")],
    table: Annotated[str, typer.Option(help="Path or URI of the JSON file to write.")],
    by: Annotated[str, typer.Option(help="f1_max, or fpr=RATE: a wanted false-positive rate.")] = "f1_max",
    all_good: Annotated[bool, typer.Option("--all-good", help="The runs' images are known to be good.")] = False,
    endpoint: Endpoint = None,
) -> None:
    """Set thresholds by the scores of finished runs, for jobs to name."""
    from jobs.calibrate import run_calibrate

    options: dict[str, Any] = {"all_good": all_good, "storage": Storage(endpoint_url=endpoint), "console": _console()}
    exits.run(lambda: run_calibrate(_open(output, endpoint), run_ids, table, by, **options))


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Folder for the results.")] = "out/demo",
) -> None:
    """Score the images of the repository with the embedded model, offline."""
    from jobs.demo import run_demo

    exits.run(lambda: run_demo(output, _console()))


def main() -> None:
    """Entry point of `alfa`."""
    # A cluster stops a job with SIGTERM; it ends as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except Exception:
        logger.critical("a fault in alfa itself; please report it with what follows", exc_info=True)
        sys.exit(exits.ERRORS)


def _open(output: str, endpoint: str | None) -> Store:
    return open_store(output, Storage(endpoint_url=endpoint))


def _console() -> Console:
    """A log or a pipe has no width; tables get more than a terminal's 80 columns there."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


if __name__ == "__main__":
    main()
