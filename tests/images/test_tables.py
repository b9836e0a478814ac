"""Tests tables as other tools write them: folders of parts, partitions, JSON Lines, and labels in common words."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline.images import DatasetError, list_references, open_dataset
from pipeline.storage import Store
from schemas.job import Dataset, References, Storage
from tests.images.listing import fault_of, listed, rows_of


def write_part(root: str, key: str, **columns: list[object]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    Store(root).write(key, sink.getvalue().to_pybytes())


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


@pytest.mark.parametrize("layout", ["auto", "table"])
@pytest.mark.parametrize(
    "names",
    [
        ("part-00000-0b1c-c000.snappy.parquet", "part-00001-0b1c-c000.snappy.parquet"),  # Spark
        ("20261127_010203_00004_abcde_0f0e", "20261127_010203_00004_abcde_1f1e"),  # Athena
        ("9_000000_000000.parquet", "9_000001_000000.parquet"),  # Ray
        ("deep/a.parquet", "deep/b.parquet"),
    ],
)
def test_a_folder_of_parts_is_one_table(root: str, layout: str, names: tuple[str, str]) -> None:
    for number, name in enumerate(names):
        write_part(root, name, uri=[f"in/{number}.jpg", f"in/{number}b.jpg"], class_name=["nut", "bolt"])
    for name in ("_SUCCESS", ".part.crc", "_temporary/0/part-00000.parquet"):
        Store(root).write(name, b"no table")
    found, rows = listed(root, layout=layout)
    assert found == "table"
    assert rows == [("in/0.jpg", "nut"), ("in/0b.jpg", "bolt"), ("in/1.jpg", "nut"), ("in/1b.jpg", "bolt")]


def test_a_folder_whose_name_ends_as_a_table_is_one_too(tmp_path: Path) -> None:
    write_part(str(tmp_path / "list.parquet"), "part-00000.parquet", uri=["a.jpg"], class_name=["nut"])
    assert listed(str(tmp_path / "list.parquet")) == ("table", [("a.jpg", "nut")])


def test_partitions_are_columns(tmp_path: Path) -> None:
    classes = ["001", "a/b c", None]
    table = pa.table({"uri": ["0.jpg", "1.jpg", "2.jpg"], "class_name": classes, "day": [1, 2, 3]})
    by = ds.partitioning(pa.schema({"day": pa.int32(), "class_name": pa.string()}), flavor="hive")
    ds.write_dataset(table, tmp_path, format="parquet", partitioning=by)
    assert "row 3 has no class_name" in fault_of(str(tmp_path))
    next(tmp_path.glob("day=3/*/*.parquet")).unlink()
    assert listed(str(tmp_path)) == ("table", [("0.jpg", "001"), ("1.jpg", "a/b c")])


def test_photos_beside_parts_are_photos_unless_the_layout_says_otherwise(tmp_path: Path) -> None:
    write_part(str(tmp_path), "list.parquet", uri=["nut/a.jpg"], class_name=["bolt"])
    Store(str(tmp_path)).write("nut/a.jpg", b"")
    assert listed(str(tmp_path)) == ("folders", [("nut/a.jpg", "nut")])
    assert listed(str(tmp_path), layout="table") == ("table", [("nut/a.jpg", "bolt")])


@pytest.mark.parametrize(
    ("log", "words"), [("_delta_log/0.json", "Delta"), ("metadata/00000-a.metadata.json", "Iceberg")]
)
def test_tables_with_a_log_of_their_own_are_refused(log: str, words: str, root: str) -> None:
    write_part(root, "data/part-00000.parquet", uri=["a.jpg"], class_name=["nut"])
    Store(root).write(log, b"{}")
    assert f"this is a{'n' if words == 'Iceberg' else ''} {words} table" in fault_of(root)


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    lines = [
        {"uri": "a.jpg", "class_name": "2026-01-01", "label": True, "size": 7},
        {"uri": "b.jpg", "class_name": 1, "extra": {"deep": [1]}},
        {"uri": "c.jpg", "class_name": "nut", "label": False},
    ]
    path = tmp_path / f"list.{suffix}"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    layout, rows = rows_of(str(path))
    assert layout == "table"
    assert [(row["key"], row["class_name"], row["label"], row["size"]) for row in rows] == [
        ("a.jpg", "2026-01-01", "true", 7),
        ("b.jpg", "1", None, None),
        ("c.jpg", "nut", "good", None),
    ]
    path.write_text('{"uri": "a.jpg", "class_name": "nut"}\n[1]\n')
    assert "line 2 of " in fault_of(str(path))
    path.write_text('{"url": "a.jpg", "class_name": "nut"}\n')
    assert "no column 'uri' (is 'url' meant?)" in fault_of(str(path))


def test_a_file_that_is_no_table_is_said(tmp_path: Path) -> None:
    (tmp_path / "list.xlsx").write_bytes(b"PK")
    fault = fault_of(str(tmp_path / "list.xlsx"))
    assert "list.xlsx is a file, but not a table that alfa reads" in fault
    assert ".parquet, .csv, .jsonl, .ndjson file or a folder of Parquet files" in fault


def test_a_table_without_classes_takes_that_of_the_job(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("uri,label\nx.jpg,OK\ny.jpg,crack\n")
    assert "no column 'class_name'" in fault_of(str(tmp_path / "a.csv"))
    _, rows = rows_of(str(tmp_path / "a.csv"), class_name="nut")
    assert [(row["class_name"], row["label"]) for row in rows] == [("nut", "good"), ("nut", "crack")]
    (tmp_path / "b.csv").write_text("uri,class_name\nx.jpg,nut\ny.jpg,bolt\n")
    assert listed(str(tmp_path / "b.csv"), class_name="nut") == ("table", [("x.jpg", "nut")])


@pytest.mark.parametrize(("delimiter", "said"), [(";", "';'"), ("\t", r"'\t'"), ("|", "'|'")])
def test_another_delimiter_is_told(tmp_path: Path, delimiter: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(f"uri{delimiter}class_name\nx.jpg{delimiter}nut\n")
    assert f"its columns are separated by {said}; alfa reads commas" in fault_of(str(tmp_path / "a.csv"))


def labels_of(path: Path, values: list[object], kind: pa.DataType | None = None) -> list[object]:
    uris = [f"{number}.jpg" for number in range(len(values))]
    pq.write_table(pa.table({"uri": uris, "class_name": ["nut"] * len(uris), "label": pa.array(values, kind)}), path)
    return [row["label"] for row in rows_of(str(path))[1]]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["good", "Normal", " OK ", "ok", "PASS", "defect-free", "no_defect"], ["good"] * 7),
        (
            ["good", "crack", "Not OK", "normality", None, "", " "],
            ["good", "crack", "Not OK", "normality", *[None] * 3],
        ),
        ([0, 1, 2, None], ["good", "1", "2", None]),
        ([0.0, 1.0, float("nan")], ["good", "1", None]),
        ([False, True, None], ["good", "true", None]),
        (["0", "1", "1.0"], ["good", "1", "1.0"]),
        (["FALSE", "True"], ["good", "true"]),
        ([b"good", b"crack"], ["good", "crack"]),
    ],
)
def test_the_words_of_the_field_for_good(tmp_path: Path, values: list[object], labels: list[object]) -> None:
    assert labels_of(tmp_path / "t.parquet", values) == labels


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        (["0", "crack"], "mixes '0' .a number. and 'crack' .a word., so it is unclear what is good"),
        (["good", "true"], "mixes 'good' .a word. and 'true' .a truth value."),
        ([1, -1], "column label has -1; use 0 for good and 1 for a defect"),
    ],
)
def test_labels_that_cannot_be_told_are_refused(tmp_path: Path, values: list[object], fault: str) -> None:
    with pytest.raises(DatasetError, match=fault):
        labels_of(tmp_path / "t.parquet", values)


def test_references_in_a_table_are_the_good_ones(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("uri,class_name,label\nx.jpg,nut,0\ny.jpg,nut,1\n")
    dataset = Dataset(images=str(tmp_path / "a.csv"))
    found = list_references(References(images=dataset.images), dataset, open_dataset(dataset, Storage()), Storage())
    assert [row["key"] for row in found] == ["x.jpg"]
