"""Tests that any input of people, files or an LLM is either understood or refused with the parser's own error."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.images import DatasetError, list_images, open_dataset
from pipeline.prompts.answers import read_description
from pipeline.storage import Store
from schemas.job import Dataset, JobError, Storage, dump_job_yaml, parse_job, read_job_yaml
from tests.llm_server import ANSWER

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.dates()
KEYS = st.sampled_from(
    ["dataset", "output", "images", "uri", "engine", "actors", "model", "levels", "method"]
) | st.text(max_size=6)
DOCUMENTS = st.dictionaries(
    KEYS, st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))
)
bounded = settings(max_examples=150, deadline=None, derandomize=True)


def is_plain(message: str) -> bool:
    """Every line says something, without control characters."""
    return all(line.strip() and line.isprintable() for line in message.split("\n"))


@bounded
@given(DOCUMENTS)
@example({"dataset": {"images": "s3://[x", "max_pixels": 1}, "output": {"uri": "x"}})
@example({"dataset": {"images": "x"}, "output": {"uri": "x"}, "threshold": {"value": float("nan")}})
@example({"a\nb": 1})
def test_any_document_is_a_job_or_a_job_error(document: dict[str, Any]) -> None:
    for merged in (document, {"dataset": {"images": "x"}, "output": {"uri": "y"}, **document}):
        try:
            job = parse_job(merged)
        except JobError as error:
            assert is_plain(str(error))
        else:
            assert parse_job(read_job_yaml(dump_job_yaml(job))) == job


@bounded
@given(st.text(alphabet=st.sampled_from("ab:-{}[]!&*#|>'\"\n \t%@`0.\x00\x85é"), max_size=40))
@example("2: [1, 2]\n? [a]\n: b")
@example("a: &a [*a]")
@example("2026-13-45: 1")
@example("a: 2026-13-45")
def test_any_text_is_a_job_or_a_job_error(text: str) -> None:
    try:
        parse_job(read_job_yaml(text), [f"dataset.images={text}"])
    except JobError as error:
        assert is_plain(str(error))


def rows_of(folder: Path, name: str) -> list[dict[str, Any]] | None:
    """The manifest, or None where the data set is refused."""
    try:
        source = open_dataset(Dataset(images=str(folder / name) if name else str(folder)), Storage())
        return [row for batch in list_images(source) for row in batch.to_pylist()]
    except DatasetError as error:
        assert str(error).strip()
        return None


COLUMNS = [
    pa.array(["a.jpg", "b.jpg"]),
    pa.array([1, 2]),
    pa.array([None, None], pa.string()),
    pa.array([None, None]),
    pa.array(["a.jpg", "b.jpg"]).dictionary_encode(),
    pa.array([["a"], ["b"]]),
    pa.array([b"a\xff", b"b"]),
    pa.array([1.5, float("nan")]),
    pa.array([{"a": 1}, {"a": 2}]),
    pa.array(["http://[a", "s3://x/../y"]),
    pa.array(["../a\nb.jpg", "/a\0b"]),
]


@bounded
@given(
    st.dictionaries(
        st.sampled_from(["uri", "class_name", "label", "mask_uri", "etag", "size"]),
        st.sampled_from(COLUMNS),
        min_size=1,
    )
)
def test_any_parquet_table_is_listed_or_refused(tmp_path_factory: pytest.TempPathFactory, columns: Any) -> None:
    folder = tmp_path_factory.mktemp("table")
    pq.write_table(pa.table(columns), folder / "list.parquet")
    rows_of(folder, "list.parquet")


@bounded
@given(
    st.binary(max_size=60)
    | st.text(alphabet=st.sampled_from('a,"\n\r\x00;./:[é'), max_size=40).map(
        lambda t: ("uri,class_name\n" + t).encode()
    )
)
@example(b"")
@example(b"uri,class_name,uri\na,b,c\n")
@example(b"uri,class_name\n\xff\xfe,b\n")
def test_any_csv_table_is_listed_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("table")
    (folder / "list.csv").write_bytes(data)
    rows_of(folder, "list.csv")


CELLS = st.sampled_from(
    ["test", "train", "normal", "anomaly", "", "pcb1", "pcb1/0.JPG", "../x", "/etc", "a\nb", ".", "é"]
)


@bounded
@given(st.lists(st.lists(CELLS, min_size=5, max_size=5), max_size=4), st.binary(max_size=30))
@example([], b"")
@example([["/etc", "test", "normal", "x.jpg", ""]], b"")
@example([["..", "test", "normal", "../x.jpg", "../../y.png"]], b"")
@example([["", "test", "", "", ""]], b"")
def test_any_visa_split_is_listed_or_refused(
    tmp_path_factory: pytest.TempPathFactory, cells: list[list[str]], tail: bytes
) -> None:
    folder = tmp_path_factory.mktemp("visa")
    text = io.StringIO()
    text.write("object,split,label,image,mask\n")
    for row in cells:
        text.write(",".join(json.dumps(cell).replace("\\n", "\n") for cell in row) + "\n")
    Store(str(folder)).write("split_csv/1cls.csv", text.getvalue().encode() + tail)
    rows_of(folder, "")


@bounded
@given(st.text(max_size=60) | st.text(alphabet=st.sampled_from('{}[]",:a1\\\n'), max_size=60))
@example("}{")
@example('{"domain": "\ud800"}')
@example("[" * 5000 + "{}")
@example('{"a":' * 20_000 + "}" * 20_000)
def test_any_answer_of_an_llm_is_a_description_or_a_value_error(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_description(text)
    assert is_plain(str(caught.value)) and len(str(caught.value)) < 3000


@bounded
@given(st.data())
def test_a_mutated_answer_is_a_plain_description_or_a_value_error(data: st.DataObject) -> None:
    answer = json.loads(json.dumps(ANSWER))
    key = data.draw(st.sampled_from(["domain", "normal", "defects", "new"]))
    answer[key] = data.draw(SCALARS.map(str) | st.lists(st.text(max_size=20), max_size=8) | st.just(answer.get(key)))
    answer["normal"] = [*answer["normal"][:5], data.draw(st.text(max_size=320))]
    try:
        found = read_description(json.dumps(answer))
    except ValueError as error:
        assert is_plain(str(error))
    else:
        assert all(3 <= len(text) <= 300 and text.isprintable() for text in found.normal)
