"""The command line: each command reads its flags and calls its job."""

from __future__ import annotations

import logging
import re
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jobs import exits, logs
from jobs.console import open_console
from jobs.flags import Endpoint, JobFlags, NightFlags, spread_flags
from jobs.logs import LogFormat
from pipeline.storage import Store, open_store
from schemas.job import JobConfig, Storage

logger = logging.getLogger(__name__)

RUN, LOOK, TUNE, KEEP = "Run a night", "Look at it", "Tune it", "Keep house"
"""Titles of the groups of commands in `alfa --help`."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Nightly, distributed, zero-shot visual inspection: a bucket of photos in, scores and masks out.",
    epilog="Run a night: alfa score job.yaml\n\nLook at it: alfa status s3://lake/inspection\n\n"
    "Tune it: alfa evaluate --preset mvtec --images DIR\n\nKeep house: alfa gc s3://lake/inspection\n\n"
    "The help of each command shows an example: alfa score --help. alfa --install-completion makes the shell complete "
    "commands and options.\n\nExit codes: 0 done, 1 failed or too many error rows, 2 bad usage or job, 130 "
    "interrupted; after 1 and 130, the same command resumes.",
)

Output = Annotated[str, typer.Argument(help="Output folder or URI of the jobs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else, to stdout.")]
Dialect = Literal["athena", "spark", "duckdb"]
ExportFormat = Literal["coco", "fiftyone", "labelstudio"]
Benchmark = Literal["mvtec", "visa"]


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"alfa {metadata.version('alfa-pipeline')}")
        except metadata.PackageNotFoundError:  # alfa submit uploads code without installing it
            typer.echo("alfa, not installed")
        raise typer.Exit


@app.callback()
def options(
    log_format: Annotated[
        LogFormat, typer.Option(envvar="ALFA_LOG_FORMAT", help="json: one object per line, and no tables.")
    ] = LogFormat.TEXT,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Sets the options that all commands share."""
    logs.configure(log_format)


@app.command(rich_help_panel=RUN, epilog="Example: alfa demo --output out/demo")
def demo(
    output: Annotated[str, typer.Option(help="Folder for the results.")] = "out/demo",
) -> None:
    """Score the repository's own images with the embedded model, offline."""
    from jobs.demo import run_demo

    exits.run(lambda: run_demo(output, open_console()))


@app.command(rich_help_panel=RUN, epilog="Example: alfa check job.yaml --json")
@spread_flags
def check(
    flags: JobFlags,
    ask: Annotated[bool, typer.Option("--ask", help="Also put one tiny question to the LLM.")] = False,
    as_json: AsJson = False,
) -> None:
    """Try everything that the job needs: stores, weights, LLM key, cluster."""
    from jobs.check import run_check

    exits.run(lambda: run_check(flags.read_job(), open_console(), ask=ask, as_json=as_json))


@app.command(rich_help_panel=RUN, epilog="Example: alfa prompts job.yaml --llm openai/gpt-4o-mini")
@spread_flags
def prompts(flags: JobFlags) -> None:
    """Make, show and check the prompts of a job's classes, without scoring an image."""
    from jobs.prompts import run_prompts

    exits.run(lambda: run_prompts(flags.read_job(), open_console()))


@app.command(rich_help_panel=RUN, epilog="Example: alfa plan job.yaml --run-date yesterday --json")
@spread_flags
def plan(flags: NightFlags, as_json: AsJson = False) -> None:
    """Show what a night would do and cost: images, classes, LLM calls, hours. Writes nothing and starts no Ray."""
    from jobs.plan import run_plan

    exits.run(lambda: run_plan(flags.read_job(), open_console(), as_json=as_json))


@app.command(rich_help_panel=RUN, epilog="Example: alfa score job.yaml --run-date 2026-01-02 --set engine.actors=4")
@spread_flags
def score(flags: NightFlags) -> None:
    """Score a night's images and publish the results. Run again, it resumes."""
    from jobs.score import run_score

    # On a cluster, stdout and stderr end up in one log, where tables would break the JSON lines.
    console = open_console(quiet=logs.current_format() is LogFormat.JSON)
    exits.run(lambda: run_score(flags.read_job(), console))


@app.command(rich_help_panel=RUN, epilog="Example: alfa submit job.yaml --address http://head:8265")
@spread_flags
def submit(
    flags: NightFlags,
    address: Annotated[str | None, typer.Option(help="Ray head, http://HOST:8265; default: RAY_ADDRESS.")] = None,
    upload: Annotated[
        bool, typer.Option(help="Upload this machine's code; else the nodes need alfa installed.")
    ] = True,
    wait: Annotated[bool, typer.Option(help="Follow the log and exit with the job's exit code.")] = True,
    again: Annotated[bool, typer.Option("--again", help="Also submit a night that has succeeded already.")] = False,
) -> None:
    """Score a night as a job of a Ray cluster. A night that is submitted twice runs once."""
    from jobs.submit import run_submit

    options = {"upload": upload, "wait": wait, "again": again}
    exits.run(lambda: run_submit(flags.read_job(), address, open_console(), logs.current_format(), **options))


@app.command(rich_help_panel=RUN, epilog="Example: alfa backfill job.yaml --from 2026-01-01 --to yesterday")
@spread_flags
def backfill(
    flags: JobFlags,
    first: Annotated[str, typer.Option("--from", metavar="NIGHT", help="YYYY-MM-DD, today or yesterday.")],
    last: Annotated[str, typer.Option("--to", metavar="NIGHT", help="YYYY-MM-DD, today or yesterday.")],
    again: Annotated[bool, typer.Option("--again", help="Also run nights that are published.")] = False,
    stop_on_error: Annotated[bool, typer.Option("--stop-on-error", help="Stop after a night that fails.")] = False,
    submit: Annotated[
        bool, typer.Option("--submit", help="Run each night as a job of a Ray cluster, see alfa submit.")
    ] = False,
    address: Annotated[str | None, typer.Option(help="With --submit: Ray head, http://HOST:8265.")] = None,
    upload: Annotated[bool, typer.Option(help="With --submit: upload this machine's code.")] = True,
) -> None:
    """Score the nights of a range of dates, one after the other. Run again, it goes on with the missing nights."""
    from jobs.backfill import run_backfill

    if address and not submit:
        exits.refuse("--address needs --submit; without it, engine.address names the cluster")
    console = open_console(quiet=logs.current_format() is LogFormat.JSON)

    def score_night(job: JobConfig) -> int:
        if not submit:
            from jobs.score import run_score

            return exits.attempt(lambda: run_score(job, console))
        from jobs.submit import run_submit

        # run_backfill has decided that this night must run, even if an earlier job of it has succeeded.
        how: dict[str, Any] = {"upload": upload, "wait": True, "again": True}
        return exits.attempt(lambda: run_submit(job, address, console, logs.current_format(), **how))

    def run() -> int:
        jobs = flags.read_nights(first, last)
        return run_backfill(jobs, score_night, console, again=again, stop_on_error=stop_on_error)

    exits.run(run)


@app.command(rich_help_panel=LOOK, epilog="Example: alfa status s3://lake/inspection --json")
def status(
    output: Output,
    as_json: AsJson = False,
    endpoint: Endpoint = None,
) -> None:
    """Show the runs of an output: progress, errors, what is published."""
    from jobs.status import print_status

    exits.run(lambda: print_status(_open(output, endpoint), open_console(), as_json=as_json))


@app.command(rich_help_panel=LOOK, epilog="Example: alfa report s3://lake/inspection --run-date 2026-01-02")
def report(
    output: Output,
    run_id: Annotated[str | None, typer.Argument(metavar="RUN_ID", help="Default: the last night's run.")] = None,
    run_date: Annotated[str | None, typer.Option(help="The night, YYYY-MM-DD.")] = None,
    endpoint: Endpoint = None,
) -> None:
    """Render the report of a published night again."""
    from jobs.report import run_report

    exits.run(lambda: run_report(_open(output, endpoint), run_id, run_date, open_console()))


@app.command(rich_help_panel=LOOK, epilog="Example: alfa diff s3://lake/inspection --fail-on-drift")
def diff(
    output: Output,
    before: Annotated[str | None, typer.Argument(metavar="NIGHT_A", help="Default: the night before NIGHT_B.")] = None,
    after: Annotated[str | None, typer.Argument(metavar="NIGHT_B", help="Default: the last published night.")] = None,
    psi: Annotated[float, typer.Option(help="PSI from which a class's scores count as shifted.")] = 0.25,
    fail_on_drift: Annotated[bool, typer.Option("--fail-on-drift", help="Exit with 1 if a class drifts.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all results as JSON.")] = None,
    endpoint: Endpoint = None,
) -> None:
    """Compare two nights: newly anomalous photos, drift of scores, the trend of the last nights."""
    from jobs.diff import run_diff

    options: dict[str, Any] = {"psi": psi, "fail_on_drift": fail_on_drift, "json_file": json_file}
    exits.run(lambda: run_diff(_open(output, endpoint), before, after, open_console(), **options))


@app.command(rich_help_panel=LOOK, epilog="Example: alfa export s3://lake/inspection 2026-01-02 --to coco")
def export(
    output: Output,
    run: Annotated[str, typer.Argument(help="A night (YYYY-MM-DD), or the id of the run that published it.")],
    to: Annotated[ExportFormat, typer.Option(help="The format to write.")],
    target: Annotated[
        str | None, typer.Option("--output", help="Folder or URI; default: exports/<run>/<format> in the output.")
    ] = None,
    endpoint: Endpoint = None,
) -> None:
    """Write a published night in the format of an annotation or dataset tool."""
    from jobs.export import run_export

    storage = Storage(endpoint_url=endpoint)
    exits.run(lambda: run_export(_open(output, endpoint), run, to, target, storage, open_console()))


@app.command(
    rich_help_panel=TUNE,
    epilog="Example: alfa evaluate --images mvtec/ --output out/eval --compare method.aligner=raw,ridge",
)
@spread_flags
def evaluate(
    flags: JobFlags,
    run: Annotated[str | None, typer.Option(help="Measure this finished run in --output instead of scoring.")] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="Also score with these options, such as method.aligner=raw."),
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option(metavar="K1,K2", help="Also score with this many known-good images per class: 0,1,2,4."),
    ] = None,
    peers: Annotated[
        str | None, typer.Option(metavar="M1,M2", help="Also score with this many peers per class: 0,8,16,32,64.")
    ] = None,
    anomaly_rate: Annotated[
        float | None,
        typer.Option(min=0.0, max=0.9, help="Draw the peers from nights with this share of anomalous images."),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="How many nights --anomaly-rate draws.")] = 20,
    preset: Annotated[Benchmark | None, typer.Option(help="Use the settings of a paper's benchmark.")] = None,
) -> None:
    """Measure scores and maps against ground truth: AUROC, AUPR, F1-max, PRO.

    One --compare with several keys ("K1=a,b K2=c,d") tries all combinations; several --compare are tried separately.
    """
    from jobs import evaluate as evaluation

    if run is not None:
        output = flags.output
        if preset or compare or shots or peers or anomaly_rate or flags.images or flags.file or not output:
            exits.refuse("--run needs --output, and excludes a job file, --images, --model, --preset and comparisons")
        overrides = flags.overrides or ()
        exits.run(lambda: evaluation.run_evaluate_run(output, run, overrides, open_console(), endpoint=flags.endpoint))
    compared = evaluation.Comparisons(
        compare or (), _read_counts("--shots", shots), _read_counts("--peers", peers), anomaly_rate, draws
    )
    defaults = dict(evaluation.PRESETS[preset]) if preset else {}
    if flags.model or any(item.startswith("model.name=") for item in flags.overrides or ()):
        defaults.pop("model", None)  # the preset's weights and size do not fit another model
    exits.run(lambda: evaluation.run_evaluate(flags.read_job(defaults), compared, preset, open_console()))


def _read_counts(flag: str, given: str | None) -> list[int]:
    if given and not re.fullmatch(r"\d+(,\d+)*", given):
        exits.refuse(f"{flag} {given}: write it as numbers with commas between, such as 0,1,2,4")
    return [int(count) for count in given.split(",")] if given else []


@app.command(
    rich_help_panel=TUNE, epilog="Example: alfa calibrate s3://lake/inspection RUN_ID --table s3://lake/thresholds.json"
)
def calibrate(
    output: Annotated[str, typer.Argument(help="Output folder or URI of the runs.")],
    run_ids: Annotated[list[str], typer.Argument(metavar="RUN...", help="Ids of finished runs, as status shows them.")],
    table: Annotated[str, typer.Option(help="Path or URI of the JSON file to write.")],
    by: Annotated[str, typer.Option(help="f1_max, or fpr=RATE for a false-positive rate.")] = "f1_max",
    all_good: Annotated[bool, typer.Option("--all-good", help="All images of the runs are known to be good.")] = False,
    endpoint: Endpoint = None,
) -> None:
    """Set each class's thresholds from the scores of finished runs, and write them to a file for jobs."""
    from jobs.calibrate import run_calibrate

    options: dict[str, Any] = {"all_good": all_good, "storage": Storage(endpoint_url=endpoint)}
    exits.run(lambda: run_calibrate(_open(output, endpoint), run_ids, table, by, console=open_console(), **options))


@app.command(
    rich_help_panel=KEEP,
    epilog="Examples: alfa gc s3://lake/inspection --older-than 48 --delete; "
    "alfa gc s3://lake/inspection --keep-nights 30 --delete",
)
def gc(
    output: Output,
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove the files; without this flag they are only counted.")
    ] = False,
    older_than: Annotated[float, typer.Option(min=1, help="Only files last written more than so many hours ago.")] = 24,
    keep_nights: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Also masks, maps and shards of all but the last N published nights."),
    ] = None,
    keep_days: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Also masks, maps and shards older than N days; the last night is always kept."
        ),
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Of those nights also the rows, commits, reports and records.")
    ] = False,
    as_json: AsJson = False,
    endpoint: Endpoint = None,
) -> None:
    """Remove files that no published night needs: superseded versions, masks and shards, also those of dead runs."""
    from jobs.gc import run_gc

    if keep_nights is not None and keep_days is not None:
        exits.refuse("--keep-nights and --keep-days exclude each other")
    if table and keep_nights is None and keep_days is None:
        exits.refuse("--table needs --keep-nights or --keep-days, which say how many nights to keep")
    options: dict[str, Any] = {
        "keep_nights": keep_nights,
        "keep_days": keep_days,
        "table": table,
        "as_json": as_json,
    }
    exits.run(lambda: run_gc(_open(output, endpoint), open_console(), older_than, delete, **options))


@app.command(rich_help_panel=KEEP, epilog="Example: alfa ledger s3://lake/inspection --rebuild")
def ledger(
    output: Output,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Make each ledger anew from its night's rows, and write what differs.")
    ] = False,
    as_json: AsJson = False,
    endpoint: Endpoint = None,
) -> None:
    """Show and repair the ledgers: the photos of each night, which jobs with dataset.select new leave out."""
    from jobs.ledger import run_ledger

    exits.run(lambda: run_ledger(_open(output, endpoint), open_console(), rebuild=rebuild, as_json=as_json))


@app.command(
    rich_help_panel=KEEP,
    epilog="Examples: alfa schema --dialect athena --output s3://lake/inspection; alfa schema --job > job.schema.json, "
    "which editors use where the first line of a job.yaml is: # yaml-language-server: $schema=job.schema.json",
)
def schema(
    dialect: Annotated[Dialect | None, typer.Option(help="Print the DDL of the scores table for this engine.")] = None,
    job: Annotated[bool, typer.Option("--job", help="Print the JSON schema of job files, for editors.")] = False,
    output: Annotated[
        str, typer.Option(help="Output folder or URI of the jobs: where the table is.")
    ] = "s3://bucket/lake",
) -> None:
    """Print the DDL of the scores table (--dialect), or the JSON schema of job files (--job)."""
    from jobs.schema import print_ddl, print_job_schema

    if (dialect is None) is not job:
        exits.refuse("schema needs either --dialect or --job")
    exits.run(print_job_schema if dialect is None else lambda: print_ddl(dialect, output))


def main() -> None:
    """Runs `alfa`."""
    # A cluster stops a job with SIGTERM; treat it like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app(prog_name="alfa")
    except Exception:
        logger.critical("a fault in alfa itself; please report it with this traceback", exc_info=True)
        sys.exit(exits.ERRORS)


def _open(output: str, endpoint: str | None) -> Store:
    return open_store(output, Storage(endpoint_url=endpoint))


if __name__ == "__main__":
    main()
