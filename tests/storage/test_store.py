import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.storage import AddressError, Store


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "lake") if request.param == "local" else f"memory://{tmp_path.name}")


def test_create_is_won_by_one(store: Store) -> None:
    assert store.create("a/b", b"first")
    assert not store.create("a/b", b"second")
    assert store.read("a/b") == b"first"


def test_of_many_threads_that_create_one_wins_and_its_bytes_stay(tmp_path: Path) -> None:
    start, wins = threading.Barrier(16), []

    def contend(number: int) -> None:
        start.wait()
        if Store(str(tmp_path)).create("lease", str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert Store(str(tmp_path)).read("lease") == str(wins[0]).encode()


def test_replace_writes_only_over_the_version_that_was_seen(store: Store) -> None:
    assert store.replace("a", b"1", None) and not store.replace("a", b"2", None)
    seen = store.version("a")
    assert store.replace("a", b"2", seen)
    assert not store.replace("a", b"3", seen) and store.read("a") == b"2"
    store.delete("a")
    assert store.version("a") is None and not store.replace("a", b"4", seen)


def test_of_many_threads_that_replace_one_version_one_wins(tmp_path: Path) -> None:
    Store(str(tmp_path)).write("a", b"0")
    seen, start = Store(str(tmp_path)).version("a"), threading.Barrier(16)

    def contend(number: int) -> bool:
        start.wait()
        return Store(str(tmp_path)).replace("a", bytes([number]), seen)

    with ThreadPoolExecutor(16) as pool:
        wins = list(pool.map(contend, range(16)))
    assert sum(wins) == 1 and Store(str(tmp_path)).read("a") == bytes([wins.index(True)])


def test_a_file_is_written_created_replaced_and_read_by_parts(store: Store, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"a" * 3_000_000 + b"end")
    second.write_bytes(b"b" * 10)
    store.write("w/a", first)
    assert store.create("c/a", first) and not store.create("c/a", second)
    assert store.holds("c/a", first) and not store.holds("c/a", second) and not store.holds("gone", first)
    seen = store.version("c/a")
    assert store.replace("c/a", second, seen) and not store.replace("c/a", first, seen)
    assert store.read("c/a") == second.read_bytes() and store.read("w/a") == first.read_bytes()
    with store.open("w/a") as file:
        assert file.seek(-5, os.SEEK_END) == 2_999_998 and file.read() == b"aaend" and file.read() == b""
        file.seek(2_999_999)
        assert file.read(2) == b"ae" and file.tell() == 3_000_001
    with pytest.raises(FileNotFoundError):
        store.open("gone")


def test_write_replaces_and_a_listing_sees_each_key_once_in_order(store: Store) -> None:
    for key in ("b", "a/2", "a/1", "a/1"):
        store.write(key, key.encode())
    assert [(info.key, info.size) for info in store.list()] == [("a/1", 3), ("a/2", 3), ("b", 1)]
    assert [info.key for info in store.list("a")] == ["a/1", "a/2"]
    assert list(store.list("missing")) == []


def test_a_local_listing_of_many_files_tells_their_versions_and_skips_what_is_no_file(tmp_path: Path) -> None:
    names = sorted([f"a/{number}" for number in range(9000)] + ["a/linked", "b/c/d", "b/e", "z"])
    for name in ("b/c/d", "b/e", "z"):
        Store(str(tmp_path)).write(name, name.encode())
    (tmp_path / "a").mkdir()
    for number in range(9000):
        (tmp_path / "a" / str(number)).touch()
    for number, time in enumerate((0, -1, -(10**9) - 5, 1_700_000_000_123_456_789)):
        os.utime(tmp_path / "a" / str(number), ns=(time, time))
    (tmp_path / "a" / "linked").symlink_to("../z")
    (tmp_path / "a" / "nowhere").symlink_to("gone")
    (tmp_path / "a" / "ring").symlink_to("..")
    os.mkfifo(tmp_path / "a" / "pipe")
    infos = list(Store(str(tmp_path)).list())
    assert [info.key for info in infos] == names
    for info in infos:  # ids of images, and so finished nights, hang on this very text
        status = (tmp_path / info.key).stat()
        assert (info.size, info.etag) == (status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}")
        assert info.modified == pytest.approx(status.st_mtime, abs=1e-6)


def test_etag_changes_with_content(store: Store) -> None:
    store.write("a", b"1")
    before = store.info("a").etag
    store.write("a", b"22")
    assert before is not None and store.info("a").etag != before


def test_missing_objects(store: Store) -> None:
    assert not store.exists("a")
    store.delete("a")
    with pytest.raises(FileNotFoundError):
        store.read("a")


class NothingOnAzure(Exception):
    """An error of Azure's client: its response is no dict, as botocore's is, and refuses every unknown attribute."""

    response = object()


def test_an_object_that_is_missing_on_azure_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cat_file(path: str) -> bytes:
        raise FileNotFoundError(path) from NothingOnAzure()

    store = Store(str(tmp_path))
    monkeypatch.setattr(store.fs, "cat_file", cat_file)
    with pytest.raises(FileNotFoundError):
        store.read("a")


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x"])
def test_a_key_never_leaves_the_store(store: Store, key: str) -> None:
    with pytest.raises(ValueError, match="leave"):
        store.write(key, b"")


def test_local_writes_leave_no_temporary_file(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write("a/b", b"1")
    store.create("a/b", b"2")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["b"]


@pytest.mark.parametrize(("root", "advice"), [("s4://lake/x", "s4"), ("dropbox://x", "dropbox")])
def test_a_store_of_an_unknown_kind_or_without_its_package_says_so(root: str, advice: str) -> None:
    with pytest.raises(AddressError, match=f"{root} cannot be opened: .*{advice}"):
        Store(root)


def test_an_address_leads_to_its_own_store_and_none_to_a_disk_from_elsewhere(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert store.store_of(str(tmp_path / "a.jpg")) is store and store.store_of("file:///b.jpg") is store
    other = store.store_of("s3://photos/line 1/a.jpg")
    assert (other.uri("x"), other.is_s3) == ("s3://photos/x", True)
    for uri in ("file:///etc/passwd", "http://127.0.0.1:9/a.jpg", "nonsense://a/b.jpg"):
        with pytest.raises(AddressError, match=f"{uri} is not read: images must lie in s3://photos"):
            other.read_uri(uri)


@pytest.mark.parametrize(
    ("first", "second", "overlap"),
    [
        ("s3://lake/photos", "s3://lake/photos/", True),
        ("s3://lake/photos", "s3a://lake/photos/out", True),
        ("s3://lake", "s3://lake/photos", True),
        ("s3://lake/photos", "s3://lake/photos-out", False),
        ("s3://lake/photos", "s3://photos/lake", False),
        ("s3://lake/photos", "/lake/photos", False),
        ("{here}/in", "file://{here}/in/out", True),
        ("{here}/in", "{here}/x/../in", True),
        ("{here}/link/out", "{here}/in", True),
        ("{here}/in", "{here}/inside", False),
        ("/", "{here}/in", True),
    ],
)
def test_roots_overlap_where_one_lies_in_the_other(first: str, second: str, overlap: bool, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("in")
    stores = [Store(root.format(here=tmp_path)) for root in (first, second)]
    assert stores[0].overlaps(stores[1]) == stores[1].overlaps(stores[0]) == overlap


def test_uris_lead_back_to_keys(store: Store) -> None:
    store.write("a b/ü#%2e.png", b"x")
    uri = store.uri("a b/ü#%2e.png")
    assert store.key_of(uri) == "a b/ü#%2e.png"
    assert store.read_uri(uri) == b"x"
    assert store.key_of("s3://elsewhere/x") is None


def test_a_store_travels_to_another_process(tmp_path: Path) -> None:
    Store(str(tmp_path)).write("a", b"1")
    assert pickle.loads(pickle.dumps(Store(str(tmp_path)))).read("a") == b"1"


def test_read_only_output_is_said_clearly() -> None:
    with pytest.raises(OSError, match=r"/proc"):
        Store("/proc/alfa").write("a", b"")
