"""Renders the scores table as DDL of query engines, from its Arrow schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyarrow as pa

from pipeline.storage import paths
from schemas.tables import SCORES

PARTITIONS = pa.schema(
    [
        pa.field("run_date", pa.date32(), metadata={"doc": "the night"}),
        pa.field("class_name", pa.string(), metadata={"doc": "class of the part"}),
    ]
)
"""Columns that are in the paths of the files, not in the files."""

_HIVE: Mapping[pa.DataType, str] = {
    pa.string(): "string",
    pa.int32(): "int",
    pa.int64(): "bigint",
    pa.float32(): "float",
    pa.bool_(): "boolean",
    pa.date32(): "date",
    pa.timestamp("us", tz="UTC"): "timestamp",
}


def render_ddl(dialect: str, output: str) -> str:
    """Renders the statements that create the table. dialect: one of DIALECTS; output: the job's output.uri."""
    return DIALECTS[dialect](f"{output.rstrip('/')}/{paths.TABLE}")


def _athena(location: str) -> str:
    return (
        f"CREATE EXTERNAL TABLE IF NOT EXISTS {paths.TABLE} (\n{_hive_columns(SCORES)}\n)\n"
        f"PARTITIONED BY (\n{_hive_columns(PARTITIONS)}\n)\n"
        f"STORED AS PARQUET\nLOCATION {_hive_quote(location + '/')};\n\n"
        f"-- after each night that has a new date or class:\nMSCK REPAIR TABLE {paths.TABLE};\n"
    )


def _spark(location: str) -> str:
    return (
        f"CREATE TABLE IF NOT EXISTS {paths.TABLE} (\n{_hive_columns(pa.schema([*SCORES, *PARTITIONS]))}\n)\n"
        f"USING PARQUET\nPARTITIONED BY ({', '.join(PARTITIONS.names)})\nLOCATION {_hive_quote(location)};\n\n"
        f"-- after each night that has a new date or class:\nMSCK REPAIR TABLE {paths.TABLE};\n"
    )


def _duckdb(location: str) -> str:
    files = _quote(f"{location}/**/*.parquet")
    types = "{'run_date': DATE, 'class_name': VARCHAR}"
    columns = ",\n".join(f"  {name}" for name in [*SCORES.names, *PARTITIONS.names])
    comments = "\n".join(
        f"COMMENT ON COLUMN {paths.TABLE}.{field.name} IS {_quote(_doc(field))};" for field in [*SCORES, *PARTITIONS]
    )
    return (
        f"CREATE OR REPLACE VIEW {paths.TABLE} AS SELECT\n{columns}\n"
        f"FROM read_parquet({files}, hive_partitioning = true, hive_types = {types});\n\n{comments}\n"
    )


def _hive_columns(schema: pa.Schema) -> str:
    return ",\n".join(f"  {field.name} {_hive_type(field.type)} COMMENT {_hive_quote(_doc(field))}" for field in schema)


def _hive_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"array<{_hive_type(kind.value_type)}>"
    if pa.types.is_struct(kind):
        return f"struct<{','.join(f'{field.name}:{_hive_type(field.type)}' for field in kind)}>"
    return _HIVE[kind]


def _doc(field: pa.Field) -> str:
    return str(field.metadata[b"doc"].decode())


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _hive_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


DIALECTS: Mapping[str, Callable[[str], str]] = {"athena": _athena, "spark": _spark, "duckdb": _duckdb}
