"""The same job on a real S3 (SeaweedFS), through the command line, as a user would run it."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.lake import collect_garbage, publish_night
from pipeline.scoring import score_shard
from pipeline.storage import AddressError, Run, Store, StoreError, read_shard
from schemas.job import Storage
from tests.command import alfa, alfa_alone
from tests.lake.nights import make_run
from tests.nights import NIGHT
from tests.places import DEMO
from tests.scoring.runs import embed, job_for, load_detector, shards_of
from tests.seaweed import ObjectStorage


def test_create_only_writes_are_honoured(s3: ObjectStorage) -> None:
    store = Store("s3://lake/create")
    assert store.create("a", b"first")
    assert not store.create("a", b"second")
    assert store.read("a") == b"first"


def test_conditional_replaces_are_honoured(s3: ObjectStorage) -> None:
    store = Store("s3://lake/replace")
    assert store.replace("a", b"1", None) and not store.replace("a", b"2", None)
    seen = store.version("a")
    assert store.replace("a", b"2", seen)
    assert not store.replace("a", b"3", seen) and store.read("a") == b"2"
    store.delete("a")
    assert not store.replace("a", b"4", seen) and not store.exists("a")


def test_a_file_larger_than_a_part_is_uploaded_under_the_same_conditions(s3: ObjectStorage, tmp_path: Path) -> None:
    store, first, second = Store("s3://lake/large"), tmp_path / "first", tmp_path / "second"
    for seed, path in enumerate((first, second)):
        path.write_bytes(np.random.default_rng(seed).bytes(36 << 20))
    assert store.create("a", first) and not store.create("a", second)
    seen = store.version("a")
    assert store.holds("a", first) and not store.replace("a", second, "another")
    assert store.replace("a", second, seen) and not store.replace("a", first, seen) and store.holds("a", second)
    store.write("a", first)
    with store.open("a") as file:
        file.seek(35 << 20)
        assert file.read() == first.read_bytes()[35 << 20 :]
    assert store.fs.call_s3("list_multipart_uploads", Bucket="lake").get("Uploads", []) == []


def test_garbage_is_collected(s3: ObjectStorage) -> None:
    output = Store("s3://lake/garbage")
    for name in ("aaa", "bbb"):
        run, shards = make_run(output, name)
        commit = publish_night(run, "m", run.shards, shards, output, name)
    assert list(collect_garbage(output, 3600, delete=True)) == []
    expected = {item.key for item in collect_garbage(output, -3600, delete=False)}
    removed = {item.key for item in collect_garbage(output, -3600, delete=True)}
    left = {info.key for info in output.list()}
    assert removed == expected and sum("runs/2026-01-02-aaa/shards/" in key for key in removed) == 2
    assert {getattr(entry, name) for entry in commit.files for name in ("key", "table_key")} < left
    assert not [key for key in left if key.startswith("runs/2026-01-02-aaa/")]


def test_listing_pages_through_many_keys(s3: ObjectStorage) -> None:
    store = Store("s3://lake/many")
    keys = [f"k/{number:04}" for number in range(1100)]
    with ThreadPoolExecutor(8) as writers:
        list(writers.map(lambda key: store.write(key, b"x"), keys))
    assert [info.key for info in store.list("k")] == keys


def test_wrong_credentials_are_one_clear_error(s3: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    store = Store("s3://lake/denied", Storage(region="us-east-1"))
    with pytest.raises(OSError, match="credentials") as caught:
        store.write("a", b"x")
    assert "wrong-secret" not in str(caught.value)


def test_a_local_table_names_photos_in_a_bucket(s3: ObjectStorage, tmp_path: Path) -> None:
    photo = (DEMO / "hazelnut/test/colour/00.jpg").read_bytes()
    Store("s3://lake/listed").write("line 1/a.jpg", photo)
    (tmp_path / "b.jpg").write_bytes(photo)
    uris = ["s3://lake/listed/line 1/a.jpg", "b.jpg", "s3://lake/listed/gone.jpg", "nonsense://x/c.jpg"]
    uris.append("s3://no-such-bucket/d.jpg")
    (tmp_path / "table.csv").write_text("uri,class_name\n" + "".join(f"{uri},hazelnut\n" for uri in uris))
    job = job_for(tmp_path / "table.csv", tmp_path / "out")
    detector = load_detector(job)
    (shard,), output = shards_of(job), Store(job.output.uri)
    run, prompts = Run("run", job, "alfa-small", "0" * 64), embed(detector, job, "hazelnut")
    score_shard(shard, run, detector, prompts, Store(str(tmp_path)), output, 2)
    rows = read_shard(output, run.shards, shard.shard_id).to_pylist()
    assert [row["error_type"] for row in rows] == [None, None, "vanished", "unreadable", "unreadable"]
    assert rows[-1]["error_message"] == "s3://no-such-bucket/d.jpg: there is no such bucket"
    assert rows[0]["score"] == rows[1]["score"]
    assert len({row["mask_uri"] for row in rows[:2]}) == 2 and all(output.read_uri(row["mask_uri"]) for row in rows[:2])


def test_another_bucket_that_is_missing_concerns_one_address_and_the_own_one_all(s3: ObjectStorage) -> None:
    with pytest.raises(AddressError, match="s3://no-such-bucket/a: there is no such bucket"):
        Store("s3://lake").read_uri("s3://no-such-bucket/a")
    with pytest.raises(AddressError, match="s3://no-such-bucket/a: there is no such bucket"):
        Store("s3://lake").info_uri("s3://no-such-bucket/a")
    with pytest.raises(StoreError, match="no such bucket; check the URI"):
        Store("s3://no-such-bucket").read_uri("s3://no-such-bucket/a")


def test_a_night_on_s3(s3: ObjectStorage) -> None:
    photos = Store("s3://lake/photos")
    for class_name, kind, numbers in (("hazelnut", "colour", "01"), ("capsules", "good", "01")):
        for number in numbers:
            data = (DEMO / class_name / "test" / kind / f"0{number}.jpg").read_bytes()
            photos.write(f"{class_name}/line 1/ü#{number}.jpg", data)
    photos.write("hazelnut/broken.jpg", b"not an image")
    arguments = (
        "score", "--images", "s3://lake/photos", "--output", "s3://lake/inspection", "--run-date", NIGHT,
        "--set", "engine.shard_size=2", "--set", "engine.max_error_rate=0.5",
    )  # fmt: skip
    first = alfa_alone(*arguments)
    assert first.returncode == 0, first.stderr
    assert "layout folders" in first.stderr and "the model that comes with alfa" in first.stdout

    lake = Store("s3://lake/inspection")
    tables = {info.key: lake.read(info.key) for info in lake.list("scores")}
    assert sorted(tables) == [
        f"scores/run_date={NIGHT}/class_name={name}/part-00000.parquet" for name in ("capsules", "hazelnut")
    ]
    rows = [row for data in tables.values() for row in pq.read_table(io.BytesIO(data)).to_pylist()]
    assert sorted(row["image_uri"] for row in rows) == sorted(photos.uri(info.key) for info in photos.list())
    for row in rows:
        if row["image_uri"].endswith("broken.jpg"):
            assert (row["status"], row["error_type"], row["score"]) == ("error", "not_an_image", None)
            continue
        mask = np.asarray(Image.open(io.BytesIO(lake.read_uri(row["mask_uri"]))))
        photo = Image.open(io.BytesIO(photos.read_uri(row["image_uri"])))
        assert mask.shape == (photo.height, photo.width) == (row["height"], row["width"])
        assert set(np.unique(mask)) <= {0, 255}
        assert row["mask_area"] == pytest.approx((mask == 255).mean(), abs=1e-6)
        assert 0 < row["score"] < 1 and row["prompt_source"] == "bundled"

    (report,) = (info.key for info in lake.list("runs") if info.key.endswith("report/index.html"))
    page = lake.read(report).decode()
    assert "hold all 4 scored images" in page and page.count("/9j/") == 4 and "not_an_image 1" in page
    assert lake.uri(report) in first.stdout
    assert lake.fs.info(lake.uri(report))["ContentType"].startswith("text/html")

    second = alfa(*arguments)
    assert second.returncode == 0 and "already published" in second.stderr
    assert {info.key: lake.read(info.key) for info in lake.list("scores")} == tables

    status = alfa("status", "s3://lake/inspection")
    assert status.returncode == 0 and "done, published" in status.stdout
