import csv
import io
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipeline.images import DatasetError, describe_left_out, list_images, open_dataset
from pipeline.images.suffixes import image_pages
from pipeline.storage import Store
from schemas.job import Dataset, Storage
from tests.images.listing import fault_of, listed, rows_of
from tests.places import SHARED

DATA = SHARED / "data"


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


def fill(root: str, *keys: str) -> None:
    for key in keys:
        Store(root).write(key, key.encode())


def test_a_folder_below_the_root_is_a_class(root: str) -> None:
    fill(
        root, "bolt/a.jpg", "bolt/deep/er/b.PNG", "nut/c.tiff", "nut/notes.txt", "nut/.hidden.jpg", ".x/y.jpg", "z.jpg"
    )
    layout, rows = listed(root)
    assert layout == "folders"
    assert sorted(rows) == [
        ("bolt/a.jpg", "bolt"),
        ("bolt/deep/er/b.PNG", "bolt"),
        ("nut/c.tiff", "nut"),
        ("z.jpg", "unsorted"),
    ]
    assert listed(root, class_name="nut") == ("folders", [("nut/c.tiff", "nut")])


def test_what_storage_systems_leave_among_photos_is_passed_over(root: str) -> None:
    fill(
        root,
        "nut/a.jpg",
        "nut/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg",
        "#recycle/nut/old.jpg",
        "$RECYCLE.BIN/b.jpg",
        "System Volume Information/c.jpg",
        "lost+found/d.jpg",
        "__MACOSX/nut/e.jpg",
        "nut/lost+found.jpg",
    )
    assert listed(root) == ("folders", [("nut/a.jpg", "nut"), ("nut/lost+found.jpg", "nut")])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["OK/a.jpg", "NG/b.jpg"], "the classes would be NG, OK, each compared within itself"),
        (["train/good/a.jpg", "test/good/b.jpg", "test/crack/c.jpg"], "the classes would be test, train"),
        (["good/a.jpg", "nut/b.jpg"], ""),
    ],
)
def test_folders_that_are_verdicts_or_parts_are_doubted(
    root: str, caplog: pytest.LogCaptureFixture, keys: list[str], said: str
) -> None:
    fill(root, *keys)
    assert listed(root)[0] == "folders"
    assert said in caplog.text if said else not caplog.text


def test_what_is_no_image_by_its_name_is_counted_and_suffixes_decide(root: str) -> None:
    names = ["a.jfif", "b.JPE", "c.avif", "d.heic", "e.jp2", "f.gif", "g.pgm", "h.mpo", "i", "j.nef", "k.NEF", "l.dat"]
    fill(root, *(f"bolt/{name}" for name in names), "bolt/.hidden.nef", "bolt/m.4711 of this morning")
    left_out: Counter[str] = Counter()
    source = open_dataset(Dataset(images=root), Storage())
    keys = [row["key"] for batch in list_images(source, left_out) for row in batch.to_pylist()]
    assert [key[5] for key in sorted(keys)] == list("abcdefgh")
    assert left_out == {"none": 1, ".nef": 2, ".dat": 1, "other": 1}
    assert describe_left_out(left_out) == "2 .nef, 1 .dat, 1 without suffix, 1 of other kinds"

    def chosen(*suffixes: str) -> str:
        return "".join(sorted(str(key)[5] for key, _ in listed(root, suffixes=suffixes)[1]))

    assert chosen(".dat", "none") == "il" and chosen(".nef") == "jk"
    assert chosen("default", ".DAT") == "abcdefghl"
    assert "(there are 8 .jfif" not in fault_of(root, suffixes=[".xyz"])
    assert "2 .nef" in fault_of(root, suffixes=[".xyz"])


def test_odd_names_do_not_swell_the_tally_of_what_is_left_out() -> None:
    left_out: Counter[str] = Counter()
    store = Store("memory://odd-names")
    for number in range(500):
        store.write(f"c/frame.{number}", b"")
    assert next(image_pages(store, (".jpg",), left_out)).keys == []
    assert sum(left_out.values()) == 500 and len(left_out) == 201 and left_out["other"] == 300
    assert describe_left_out(left_out).endswith("193 more")


def test_photos_in_one_folder_want_a_class(root: str) -> None:
    fill(root, "a.jpg", "b.jpg")
    assert listed(root, class_name="bolt") == ("flat", [("a.jpg", "bolt"), ("b.jpg", "bolt")])
    assert "--class" in fault_of(root)


def test_mvtec_has_labels_and_masks_and_leaves_train_out(root: str) -> None:
    fill(root, "nut/train/good/0.png", "nut/test/good/0.png", "nut/test/bent/0.png", "nut/test/bent/1.png")
    fill(root, "nut/ground_truth/bent/0_mask.png", "bolt/test/good/0.png")
    layout, rows = rows_of(root)
    assert layout == "mvtec"
    facts = [(row["key"], row["class_name"], row["label"], row["mask_uri"]) for row in rows]
    assert facts == [
        ("bolt/test/good/0.png", "bolt", "good", None),
        ("nut/test/bent/0.png", "nut", "bent", Store(root).uri("nut/ground_truth/bent/0_mask.png")),
        ("nut/test/bent/1.png", "nut", "bent", None),
        ("nut/test/good/0.png", "nut", "good", None),
    ]


def test_visa_is_what_its_split_file_lists(root: str) -> None:
    lines = [
        ["object", "split", "label", "image", "mask"],
        ["pcb1", "train", "normal", "pcb1/Data/Images/Normal/0.JPG", ""],
        ["pcb1", "test", "normal", "pcb1/Data/Images/Normal/1.JPG", ""],
        ["pcb1", "test", "anomaly", "pcb1/Data/Images/Anomaly/2.JPG", "pcb1/Data/Masks/Anomaly/2.png"],
        ["pcb1", "test", "anomaly", "pcb1/Data/Images/Anomaly/gone.JPG", ""],
    ]
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    Store(root).write("split_csv/1cls.csv", text.getvalue().encode())
    fill(root, *(line[3] for line in lines[1:4]))
    layout, rows = rows_of(root)
    assert layout == "visa"
    assert [(row["label"], row["etag"] is None) for row in rows] == [
        ("good", False),
        ("anomaly", False),
        ("anomaly", True),
    ]
    assert [row["mask_uri"] for row in rows] == [None, Store(root).uri("pcb1/Data/Masks/Anomaly/2.png"), None]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_gives_each_photo_a_class_and_a_label(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = str(tmp_path / "other" / "b.jpg")
    table = pa.table(
        {
            "uri": ["in/a.jpg", elsewhere, "in/a.jpg", "s3://bucket/c d#1?.jpg"],
            "class_name": ["007", "nut", "nut", "nut"],
            "label": ["good", None, "bent", None],
        }
    )
    path = tmp_path / "list" / f"images.{kind}"
    path.parent.mkdir()
    if kind == "csv":
        pa.csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    layout, rows = rows_of(str(path))
    assert layout == "table"
    assert [(row["uri"], row["key"], row["class_name"], row["label"]) for row in rows] == [
        (str(tmp_path / "list" / "in" / "a.jpg"), "in/a.jpg", "007", "good"),
        (elsewhere, elsewhere, "nut", None),
        ("s3://bucket/c d#1?.jpg", "/s3://bucket/c d#1?.jpg", "nut", None),
    ]
    assert "1 images more than once" in caplog.text


def test_a_table_takes_what_it_names_whatever_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("uri,class_name\na.nef,nut\nb,nut\n")
    assert [key for key, _ in listed(str(tmp_path / "t.csv"), suffixes=[".jpg"])[1]] == ["a.nef", "b"]


def test_faulty_tables_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url,class_name\nx.jpg,nut\n")
    assert "no column 'uri' (is 'url' meant?)" in fault_of(str(tmp_path / "a.csv"))
    (tmp_path / "b.csv").write_text("uri,class_name\nx.jpg,nut\ny.jpg,\n")
    assert "row 2 has no class_name" in fault_of(str(tmp_path / "b.csv"))
    (tmp_path / "e.csv").write_text("URI,Class_Name\nx.jpg,nut\n")
    assert "no column 'uri' (is 'URI' meant?)" in fault_of(str(tmp_path / "e.csv"))
    for encoding in ("utf-16-le", "utf-16-be"):
        (tmp_path / "f.csv").write_bytes("\ufeffuri,class_name\nx.jpg,nut\n".encode(encoding))
        assert "f.csv is UTF-16, as Excel writes Unicode text; save it as UTF-8" in fault_of(str(tmp_path / "f.csv"))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no table")
    assert "cannot be read as a table" in fault_of(str(tmp_path / "c.parquet"))
    assert "does not exist" in fault_of(str(tmp_path / "d.csv"))


def test_nothing_to_score_is_said(root: str) -> None:
    assert "no images" in fault_of(root)
    fill(root, "bolt/a.jpg")
    assert "no images of class 'nut'" in fault_of(root, layout="folders", class_name="nut")


def test_awkward_keys_keep_their_names_and_ids_differ(root: str) -> None:
    keys = ["c/a b.jpg", "c/ü.jpg", "c/#1.jpg", "c/%2e%2e.jpg", "c/new\nline.jpg", "c/漢字.jpg"]
    fill(root, *keys)
    _, rows = rows_of(root)
    assert sorted(str(row["key"]) for row in rows) == sorted(keys)
    assert len({row["image_id"] for row in rows}) == len(keys)
    assert [Store(root).read_uri(str(row["uri"])) for row in rows] == [str(row["key"]).encode() for row in rows]


def test_an_id_follows_the_version_of_an_image(tmp_path: Path) -> None:
    fill(str(tmp_path), "c/a.jpg")
    first = rows_of(str(tmp_path))[1][0]["image_id"]
    assert rows_of(str(tmp_path))[1][0]["image_id"] == first
    Store(str(tmp_path)).write("c/a.jpg", b"another photo")
    assert rows_of(str(tmp_path))[1][0]["image_id"] != first


def test_many_keys_come_in_bounded_batches(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for number in range(20_000):
        (tmp_path / "c" / f"{number}.jpg").touch()
    source = open_dataset(Dataset(images=str(tmp_path)), Storage())
    sizes = [batch.num_rows for batch in list_images(source)]
    assert sum(sizes) == 20_000 and len(sizes) > 1


@pytest.mark.skipif(not DATA.is_dir(), reason="the development data sets are not on this machine")
@pytest.mark.parametrize(
    ("folder", "layout", "good", "anomalous"),
    [("visa", "visa", 60, 100), ("aws_cookie", "mvtec", 31, 32), ("hazelnut_toy", "mvtec", 34, 17)],
)
def test_real_sets_are_read_whole(folder: str, layout: str, good: int, anomalous: int) -> None:
    found, rows = rows_of(str(DATA / folder))
    assert found == layout
    labels = [row["label"] == "good" for row in rows]
    assert (labels.count(True), labels.count(False)) == (good, anomalous)
    assert all((row["mask_uri"] is None) == (row["label"] == "good") for row in rows)
    assert all(row["etag"] is not None for row in rows)


def test_images_of_a_table_never_share_a_key(tmp_path: Path) -> None:
    """Of one bucket or another, of one scheme or another: masks are named by keys."""
    inside = str(tmp_path / "list")
    uris = [
        "x/a.jpg",
        "/x/a.jpg",
        "../x/a.jpg",
        f"{inside}/y/a.jpg",
        "s3://a/b.jpg",
        "gs://a/b.jpg",
        "a/b.jpg",
        "/a/b.jpg",
    ]
    (tmp_path / "list").mkdir()
    pq.write_table(pa.table({"uri": uris, "class_name": ["nut"] * len(uris)}), tmp_path / "list" / "t.parquet")
    _, rows = rows_of(str(tmp_path / "list" / "t.parquet"))
    assert len({row["key"] for row in rows}) == len({row["uri"] for row in rows}) == len(uris)
    assert rows[2]["uri"] == str(tmp_path / "x" / "a.jpg")


def test_one_image_spelt_in_two_ways_is_listed_once(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"uri": ["a.jpg", f"file://{tmp_path}/a.jpg"], "class_name": ["nut"] * 2}), tmp_path / "t.parquet"
    )
    assert len(rows_of(str(tmp_path / "t.parquet"))[1]) == 1


@pytest.mark.parametrize("uri", ["s3://key:secret-51c@bucket/a.jpg", "https://host/a.jpg?X-Amz-Signature=secret-51c"])
def test_a_table_that_tells_secrets_is_refused(tmp_path: Path, uri: str) -> None:
    pq.write_table(pa.table({"uri": [uri], "class_name": ["nut"]}), tmp_path / "t.parquet")
    with pytest.raises(DatasetError, match="must not hold credentials") as caught:
        rows_of(str(tmp_path / "t.parquet"))
    assert "51c" not in str(caught.value)


def test_a_local_name_that_is_no_unicode_has_a_row_too(tmp_path: Path) -> None:
    (tmp_path / "nut").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/nut/\xff\xfe.jpg")).write_bytes(b"")
    _, rows = rows_of(str(tmp_path))
    assert [row["key"] for row in rows] == ["nut/\\xff\\xfe.jpg"]
