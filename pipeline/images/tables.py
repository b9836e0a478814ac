"""Reads tables of images: Parquet, CSV and JSON Lines files, and folders of Parquet parts (Spark, Athena, Ray)."""

from __future__ import annotations

import difflib
import io
import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.storage import ObjectInfo, Store

SUFFIXES = (".parquet", ".csv", ".jsonl", ".ndjson")
GOOD = "good"
GOOD_WORDS = frozenset((GOOD, "normal", "nominal", "ok", "pass", "passed", "no defect", "defect-free"))
"""Labels that mean that a photo is good, in lower case."""

_PARTS = frozenset(
    ("bad", "ng", "nok", "defect", "defective", "anomaly", "abnormal", "fail", "failed", "train", "test")
)
"""Names of folders that hold a verdict, or a part of a data set, and no class."""

COLUMNS = ("uri", "class_name", "size", "etag", "label", "mask_uri")
"""The columns that are read; others are ignored."""
_TEXTS = {name: pa.string() for name in COLUMNS if name != "size"}
_SWITCHES = {"false": GOOD, "true": "true"}
_BATCH = 16_384
_MAGIC = b"PAR1"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_NULL = "__HIVE_DEFAULT_PARTITION__"

Rows = dict[str, Sequence[Any]]
"""Some rows of a table, by column. It has those of COLUMNS that the table has."""


def has_parts(store: Store) -> bool:
    """Whether a folder holds Parquet files, at any depth."""
    try:
        return next(_parts(store, store.list()), None) is not None
    except NotADirectoryError:
        return False


def read_table(store: Store, name: str, wanted: Sequence[str]) -> Iterator[Rows]:
    """Yields the rows of a file below the store's root, some at a time; without a name, those of all Parquet parts.

    wanted: columns that the table must have; `name=value` folders count as columns. Raises ValueError, which says what
    is wrong and where.
    """
    if name:
        yield from _read_file(store, name, wanted)
        return
    infos = list(store.list())
    _refuse_logs(info.key for info in infos)
    for key in _parts(store, infos):
        known = _partitions(key)
        for rows in _read_file(store, key, [column for column in wanted if column not in known]):
            length = len(next(iter(rows.values()), ()))
            yield {**{column: [value] * length for column, value in known.items()}, **rows}


class Labels:
    """Reads the labels of one table, which are all of one kind.

    They are words, of which GOOD_WORDS mean good and others name a defect; or numbers, of which 0 means good; or false
    (good) and true.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, str] = {}

    def read(self, value: object) -> str | None:
        """Returns `good`, the kind of defect, or None if there is no label.

        Raises ValueError if the table mixes words, numbers and truth values, or has a number below zero.
        """
        text = to_text(value)
        if text is None or not text.strip():
            return None
        text = text.strip()
        kind, label = _read_label(text)
        self._kinds.setdefault(kind, text)
        if len(self._kinds) > 1:
            found = " and ".join(f"{example!r} ({kind})" for kind, example in self._kinds.items())
            raise ValueError(f"column label mixes {found}, so it is unclear what is good; use one way for all")
        return label


def to_text(value: object) -> str | None:
    """Converts a value of a table to text; None for a missing value.

    Raises ValueError if it is not text, a number or a truth value.
    """
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # whole numbers are read as floats if the column has gaps
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"a column has the wrong type: {str(value)[:80]} is not text")
    return str(value)


def are_parts(classes: Iterable[str]) -> bool:
    """Whether classes have the names of verdicts or parts of a data set, all of them."""
    return all(name.lower() in GOOD_WORDS | _PARTS for name in classes)


def require_columns(found: Iterable[str], wanted: Iterable[str], place: str) -> None:
    """Raises ValueError if columns are missing, or two have the same name."""
    found = list(found)
    if len(set(found)) < len(found):
        raise ValueError(f"{place} has two columns with the same name; its columns: {', '.join(found)}")
    for name in wanted:
        if name not in found:
            raise ValueError(f"{place} has no column {name!r}{_hint(name, found)}; its columns: {', '.join(found)}")


def _hint(name: str, found: Sequence[str]) -> str:
    delimiter = next((mark for mark in ";\t|" if len(found) == 1 and mark in found[0]), None)
    if delimiter is not None:
        return f" (its columns are separated by {delimiter!r}; alfa reads commas)"
    folded = {column.strip().lower(): column for column in found}
    near = difflib.get_close_matches(name, folded, n=1)
    return f" (is {folded[near[0]]!r} meant?)" if near else ""


def _read_label(text: str) -> tuple[str, str]:
    """Returns the kind of a label (word, number or truth value), and its meaning."""
    word = text.lower()
    if word in _SWITCHES:
        return "a truth value", _SWITCHES[word]
    try:
        number = float(text)
    except ValueError:
        return "a word", GOOD if word.replace("_", " ") in GOOD_WORDS else text
    if number < 0:
        raise ValueError(f"column label has {text}; use 0 for good and 1 for a defect, or words")
    return "a number", GOOD if number == 0 else text


def _read_file(store: Store, name: str, wanted: Sequence[str]) -> Iterator[Rows]:
    data = io.BytesIO(store.read(name))
    suffix = posixpath.splitext(name)[1].lower()
    try:
        if suffix in (".jsonl", ".ndjson"):
            yield from _read_json_lines(data, wanted, name)
        elif suffix == ".csv":
            if data.getbuffer()[:2] in _UTF_16:
                raise ValueError(f"{name} is UTF-16, as Excel writes Unicode text; save it as UTF-8")
            reader = pa.csv.open_csv(
                data,
                parse_options=pa.csv.ParseOptions(newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(column_types=_TEXTS, strings_can_be_null=True),
            )
            require_columns(reader.schema.names, wanted, name)
            yield from map(_to_rows, reader)
        else:
            file = pq.ParquetFile(data)
            require_columns(file.schema_arrow.names, wanted, name)
            known = [column for column in COLUMNS if column in file.schema_arrow.names]
            yield from map(_to_rows, file.iter_batches(columns=known))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name} cannot be read as a table: {str(error)[:300]}") from None


def _to_rows(batch: pa.RecordBatch) -> Rows:
    return {name: batch.column(name).to_pylist() for name in COLUMNS if name in batch.schema.names}


def _read_json_lines(data: io.BytesIO, wanted: Sequence[str], place: str) -> Iterator[Rows]:
    lines = ((number, line) for number, line in enumerate(data, 1) if line.strip())
    while some := [_read_line(line, f"line {number} of {place}") for number, line in islice(lines, _BATCH)]:
        names = {name for row in some for name in row}
        require_columns(names, wanted, place)
        yield {name: [row.get(name) for row in some] for name in COLUMNS if name in names}


def _read_line(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"{place} is not a JSON object; JSON Lines have one on every line")
    return row


def _refuse_logs(keys: Iterable[str]) -> None:
    """Raises ValueError for Iceberg and Delta tables, whose logs say which of their files are current."""
    for key in keys:
        iceberg = key.startswith("metadata/") and key.endswith(".metadata.json")
        if iceberg or key.startswith("_delta_log/"):
            kind = "an Iceberg" if iceberg else "a Delta"
            raise ValueError(f"this is {kind} table, whose folder also has deleted rows; export its current rows")


def _parts(store: Store, infos: Iterable[ObjectInfo]) -> Iterator[str]:
    """Yields the keys of Parquet files, by suffix; files without one, as Athena writes them, by their first bytes."""
    for info in infos:
        parts = info.key.split("/")
        if any(part.startswith(("_", ".")) for part in parts):
            continue
        if parts[-1].lower().endswith(".parquet") or ("." not in parts[-1] and _is_parquet(store, info)):
            yield info.key


def _is_parquet(store: Store, info: ObjectInfo) -> bool:
    with store.open(info.key) as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _partitions(key: str) -> dict[str, str | None]:
    pairs = (part.partition("=") for part in key.split("/")[:-1] if "=" in part)
    return {name: None if value == _NULL else unquote(value) for name, _, value in pairs if name in COLUMNS}
