"""Publishes nights in an Apache Iceberg table: a night is one snapshot, made from the files that its commit names.

Data files are written first. Then one snapshot removes the night's old files and adds the new ones, so readers see
either the whole old night or the whole new one. A killed process may leave data files that no snapshot refers to;
Iceberg's own maintenance (remove_orphan_files) removes them.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import logging
import uuid
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from pipeline.lake.commits import read_commit
from pipeline.lake.reading import read_groups
from pipeline.storage import Store, leases, open_store, paths, redact
from schemas.job import JobConfig, parse_job, read_job_yaml
from schemas.records import Commit, CommitFile
from schemas.tables import SCORES

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table

logger = logging.getLogger(__name__)

_ATTEMPTS = 5
"""Tries to commit. Other nights commit to the same table, and a writer that was overtaken starts again from it."""

_CATALOG_PATIENCE_S = 180.0
"""Seconds to wait for a catalog that is restarted, fails over or is locked; failing at once would waste the night."""

_PARTITIONS = ("run_date", "class_name")

SCHEMA = pa.schema(
    [
        *SCORES,
        pa.field("run_date", pa.date32(), nullable=False, metadata={"doc": "the night"}),
        pa.field("class_name", pa.string(), nullable=False, metadata={"doc": "class of the part"}),
    ]
)
"""Columns of a data file. Unlike the files of the table, they include the partition columns."""


class LakeError(ValueError):
    """The job's section `lake` cannot be used; the message says what to set."""


class CatalogError(OSError):
    """The catalog does not accept the night. The Parquet commit stands; running the job again continues there."""


def open_catalog(job: JobConfig) -> Catalog:
    """Opens the catalog of job.lake: the named one of pyiceberg's configuration, else SQLite beside a local output.

    Raises LakeError where there is none, OSError where it does not answer.
    """
    try:
        from pyiceberg.catalog import load_catalog
    except ImportError as error:
        raise LakeError(
            f"lake.format iceberg needs pyiceberg ({error}); pip install 'alfa-pipeline[iceberg]'"
        ) from None
    name, output = job.lake.catalog, open_store(job.output.uri, job.storage)
    if name is None:
        if not output.is_local:
            raise LakeError(
                f"lake.catalog is required for {output.uri('')}: the embedded catalog, a SQLite file, needs a local "
                f"output. Name a catalog, and configure it with PYICEBERG_CATALOG__<NAME>__URI or ~/.pyiceberg.yaml"
            )
        output.write(
            "iceberg/README", b"An Apache Iceberg warehouse; catalog.db is its catalog (pyiceberg, type sql).\n"
        )
        folder = output.uri("iceberg")
        properties = {"type": "sql", "uri": f"sqlite:///{folder}/catalog.db", "warehouse": f"file://{folder}"}
        # If two drivers create its tables at once, the second fails, and finds them on the next try.
        return _patiently(job)(load_catalog, "alfa", **properties)
    try:
        return load_catalog(name)
    except OSError:
        raise
    except Exception as error:
        raise LakeError(
            f"the Iceberg catalog {name!r} cannot be opened: {redact(str(error))}; configure it with "
            f"PYICEBERG_CATALOG__{name.upper()}__URI in the environment, or in ~/.pyiceberg.yaml"
        ) from error


def publish_snapshot(job: JobConfig, output: Store, owner: str) -> None:
    """Publishes the night of job.run_date in the Iceberg table, as its commit says. Doing it again changes nothing.

    Waits some minutes for a catalog that does not answer. owner: name of this process, for the lease on the night,
    which keeps the commit from being replaced meanwhile. Raises LakeError, CatalogError or LeaseLostError.
    """
    lease = leases.acquire(output, paths.night_lease(job.run_date), owner, job.engine.lease_s)
    assert lease is not None  # acquire waits, because is_done is never true
    with lease.held(job.engine.lease_s):
        commit = read_commit(output, job.run_date)
        if commit is None:
            raise LakeError(f"night {job.run_date} has no commit at {output.uri('')}")
        with _as_catalog_error(job):
            _patiently(job)(_publish, job, commit, output, lease)


def _publish(job: JobConfig, commit: Commit, output: Store, lease: leases.Lease) -> None:
    """Publishes a commit. A call that is repeated because its answer was lost finds the night published."""
    table = _open_table(open_catalog(job), job.lake.table)
    properties = _snapshot_properties(commit)
    if _is_published(table, properties):
        return
    files = [_write_file(table, entry, job.run_date, output) for entry in commit.files]
    _commit(table, files, job.run_date, properties, lease)
    logger.info("night %s is a snapshot of the Iceberg table %s", job.run_date, job.lake.table)


def _patiently(job: JobConfig) -> Retrying:
    """Retries calls that fail because the catalog does not answer or is busy."""

    def warn(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        logger.warning(
            "the catalog of %s does not answer or is busy (%s: %s); trying again",
            job.lake.table, type(error).__name__, redact(str(error))[:200],
        )  # fmt: skip

    return Retrying(
        retry=retry_if_exception(_is_transient),
        stop=stop_after_delay(_CATALOG_PATIENCE_S),
        wait=wait_random_exponential(multiplier=0.5, max=10.0),
        before_sleep=warn,
        reraise=True,
    )


def _is_transient(error: BaseException | None) -> bool:
    """Whether an error of a catalog, or of its driver, is worth another try."""
    from pyiceberg import exceptions

    passing = (
        ConnectionError,
        TimeoutError,
        exceptions.CommitFailedException,
        exceptions.CommitStateUnknownException,
        exceptions.ServerError,
        exceptions.ServiceUnavailableError,
        exceptions.ValidationException,  # other nights have committed first, several times
    )
    if error is None:
        return False
    # The errors of requests and SQLAlchemy are recognised by name, because alfa does not depend on these packages.
    names = {kind.__name__ for kind in type(error).__mro__}
    away = isinstance(error, passing) or not names.isdisjoint(
        {"ConnectionError", "Timeout", "OperationalError", "IntegrityError"}
    )
    return away or _is_transient(error.__cause__)


def retract_night(output: Store, run_id: str, lease: leases.Lease) -> None:
    """Removes the night of a published run from its Iceberg table, in one snapshot, if it is in one.

    lease: on the night, held by the caller. Raises LakeError or CatalogError.
    """
    from pyiceberg.exceptions import NoSuchTableError

    try:
        job = parse_job(read_job_yaml(output.read(paths.run_key(run_id, "job.yaml")).decode()))
    except FileNotFoundError:
        return
    if job.lake.format != "iceberg":
        return
    catalog = open_catalog(job)
    with _as_catalog_error(job):
        try:
            table = catalog.load_table(job.lake.table)
        except NoSuchTableError:
            return
        if _files_of(table, job.run_date):
            _commit(table, [], job.run_date, {"alfa.run_date": str(job.run_date)}, lease)


@contextlib.contextmanager
def _as_catalog_error(job: JobConfig) -> Iterator[None]:
    """Turns the errors of a catalog into CatalogError, because catalogs and their drivers share no base class."""
    try:
        yield
    except (LakeError, OSError, leases.LeaseLostError):
        raise
    except Exception as error:
        raise CatalogError(
            f"night {job.run_date} could not be published in the Iceberg table {job.lake.table}: "
            f"{type(error).__name__}: {redact(str(error))}"
        ) from error


def _open_table(catalog: Catalog, name: str) -> Table:
    """Opens the table, or creates it, and adds missing columns of SCHEMA. Columns are never removed."""
    from pyiceberg.exceptions import NoSuchTableError, TableAlreadyExistsError
    from pyiceberg.transforms import IdentityTransform

    try:
        table = catalog.load_table(name)
    except NoSuchTableError:
        catalog.create_namespace_if_not_exists(name.rpartition(".")[0])
        try:
            with catalog.create_table_transaction(name, SCHEMA) as change, change.update_spec() as spec:
                for column in _PARTITIONS:
                    spec.add_field(column, IdentityTransform(), column)
        except TableAlreadyExistsError:  # another driver has created it meanwhile
            pass
        table = catalog.load_table(name)
    names = {table.schema().find_column_name(field.source_id): field.transform for field in table.spec().fields}
    if not isinstance(names.get("run_date"), IdentityTransform):
        raise LakeError(f"lake.table {name} exists, but is not partitioned by run_date; use another table")
    if missing := set(SCHEMA.names) - set(table.schema().as_arrow().names):
        logger.info("the Iceberg table %s gets new columns: %s", name, ", ".join(sorted(missing)))
        with table.update_schema() as schema:
            schema.union_by_name(SCHEMA)
    return table


def _snapshot_properties(commit: Commit) -> dict[str, str]:
    digest = hashlib.sha256("\n".join(entry.sha256 for entry in commit.files).encode()).hexdigest()
    return {
        "alfa.run_date": str(commit.run_date),
        "alfa.run_id": commit.run_id,
        "alfa.manifest": commit.manifest,
        "alfa.files": digest,
    }


def _is_published(table: Table, properties: Mapping[str, str]) -> bool:
    """Whether the night's last snapshot, among the ancestors of the current one, has these properties."""
    from pyiceberg.table.snapshots import ancestors_of

    for snapshot in ancestors_of(table.current_snapshot(), table.metadata):
        said = {} if snapshot.summary is None else snapshot.summary.additional_properties
        if said.get("alfa.run_date") == properties["alfa.run_date"]:
            return all(said.get(key) == value for key, value in properties.items())
    return False


def _write_file(table: Table, entry: CommitFile, run_date: datetime.date, output: Store) -> str:
    """Writes the rows of a class with the table's columns and their ids, a row group at a time. Returns the path."""
    schema = table.schema().as_arrow()
    path = table.location_provider().new_data_location(f"{uuid.uuid4()}.parquet")
    with (
        table.io.new_output(path).create() as file,
        pq.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        for rows in read_groups(output, entry):
            columns = {name: rows.column(name) for name in rows.column_names}
            columns["run_date"] = pa.repeat(pa.scalar(run_date, pa.date32()), rows.num_rows)
            columns["class_name"] = pa.repeat(entry.class_name, rows.num_rows)
            values = [
                columns[field.name].cast(field.type) if field.name in columns else pa.nulls(rows.num_rows, field.type)
                for field in schema
            ]
            writer.write_table(pa.table(values, schema=schema), row_group_size=65_536)
    return path


def _files_of(table: Table, run_date: datetime.date) -> list[DataFile]:
    return [task.file for task in table.scan(row_filter=f"run_date = '{run_date}'").plan_files()]


def _commit(
    table: Table, paths: list[str], run_date: datetime.date, properties: Mapping[str, str], lease: leases.Lease
) -> None:
    """Replaces the night's files in one snapshot. Tries again if another night has committed meanwhile."""
    from pyiceberg.exceptions import CommitFailedException, ValidationException
    from pyiceberg.io.pyarrow import parquet_files_to_data_files

    for attempt in range(1, _ATTEMPTS + 1):
        lease.check()
        old = _files_of(table, run_date)
        try:
            with table.transaction() as change, change.update_snapshot(dict(properties)).overwrite() as snapshot:
                for file in old:
                    snapshot.delete_data_file(file)
                for file in parquet_files_to_data_files(table.io, table.metadata, iter(paths)):
                    snapshot.append_data_file(file)
            return
        except (CommitFailedException, ValidationException):
            if attempt == _ATTEMPTS:
                raise
            table.refresh()
