"""Tests `alfa gc`: it removes superseded files, and keeps those that a commit names or that may be in use."""

from __future__ import annotations

import json
import time
from datetime import date
from pathlib import Path

import pytest
from rich.console import Console

from jobs.gc import run_gc
from pipeline.lake import collect_garbage, publish_night, read_commit
from pipeline.storage import STAGING, Store, leases, paths
from tests.lake.nights import DAY_S, age, keys, make_run

NIGHT = date(2026, 1, 2)


def make_lake(output: Store) -> None:
    """A night that run aaa published and run bbb replaced, leftovers of both, and a run ccc without a commit."""
    for name in ("aaa", "bbb"):
        run, shards = make_run(output, name)
        publish_night(run, "m1", run.shards, shards, output, name)
        for version in (name, f"{name}-123"):
            output.write(paths.mask_key(NIGHT, version, "nut", "1.png"), b"mask")
            output.write(paths.map_key(NIGHT, version, "nut", "1.png"), b"map")
        for digest in ("m0", "m1"):
            output.write(paths.manifest_key(run.run_id, digest), b"manifest")
        output.write(paths.version_key(run.run_id, "m0", NIGHT, "nut", "0" * 64), b"old")
        output.write(f"{paths.masked_shards(run.run_id, '123')}/one.parquet", b"shard")
        for record in ("job.yaml", "stats.json", "report/index.html"):
            output.write(paths.run_key(run.run_id, record), b"record")
        for number in (1, 2):
            release(output, paths.driver_lease(run.run_id), number)
    make_run(output, "ccc")
    output.write("prompts/nut/abc.json", b"{}")
    output.write("exports/of/mine.json", b"{}")


def release(output: Store, name: str, number: int, expires_at: float = 0.0) -> None:
    output.write(leases.lease_key(name, number), json.dumps({"owner": "x", "expires_at": expires_at}).encode())


def kept_by_commit(output: Store) -> set[str]:
    commit = read_commit(output, NIGHT)
    assert commit is not None
    return {getattr(entry, name) for entry in commit.files for name in ("key", "table_key")}


def test_what_no_commit_names_goes_and_everything_else_stays(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    make_lake(output)
    (tmp_path / STAGING / "unfinished").write_bytes(b"half")
    age(tmp_path)
    before = keys(output)
    expected = list(collect_garbage(output, DAY_S, delete=False))
    assert keys(output) == before and (tmp_path / STAGING / "unfinished").exists()
    removed = list(collect_garbage(output, DAY_S, delete=True))
    assert set(removed) == set(expected) and len(set(removed)) == len(removed) == len(expected)
    assert not (tmp_path / STAGING / "unfinished").exists()
    run = "runs/2026-01-02"
    assert keys(output) == kept_by_commit(output) | {
        *(f"{run}-{name}/{record}" for name in ("aaa", "bbb") for record in ("job.yaml", "stats.json")),
        *(f"{run}-{name}/report/index.html" for name in ("aaa", "bbb")),
        *(f"{run}-bbb/shards/{shard}.arrow" for shard in ("one", "two")),
        f"{run}-bbb/manifest-m1.parquet",
        "masks/run_date=2026-01-02/bbb/nut/1.png.png",
        "maps/run_date=2026-01-02/bbb/nut/1.png.png",
        "commits/2026-01-02.json",
        "prompts/nut/abc.json",
        "exports/of/mine.json",
    }
    assert list(collect_garbage(output, DAY_S, delete=True)) == []


def test_masks_of_thresholds_that_follow_from_the_scores_stay_with_their_commit(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    run, shards = make_run(output, "aaa")
    folder = paths.masked_shards(run.run_id, "123")
    for shard in shards:
        output.write(paths.shard_key(folder, shard), output.read(paths.shard_key(run.shards, shard)))
    publish_night(run, "m1", folder, shards, output, "aaa")
    masks = [paths.mask_key(NIGHT, paths.mask_version(run.run_id, digest), "nut", "1.png") for digest in (None, "123")]
    for mask in masks:
        output.write(mask, b"mask")
    age(tmp_path)
    assert [item.key for item in collect_garbage(output, DAY_S, delete=True) if item.kind != "leases"] == masks[:1]


def test_what_is_young_stays(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    make_lake(output)
    age(tmp_path, DAY_S / 2)
    assert list(collect_garbage(output, DAY_S, delete=True)) == []


@pytest.mark.parametrize("delete", [False, True])
def test_a_run_whose_driver_is_alive_is_left_alone(tmp_path: Path, delete: bool) -> None:
    output = Store(str(tmp_path))
    make_lake(output)
    alive = "2026-01-02-ccc"
    age(tmp_path)
    release(output, paths.driver_lease(alive), 1, time.time() + 60)
    removed = list(collect_garbage(output, DAY_S, delete=delete))
    assert removed and not any(alive in item.key for item in removed)
    assert leases.holder(output, paths.driver_lease(alive)) == "x"


def test_a_night_published_again_while_garbage_is_collected_keeps_its_files(tmp_path: Path) -> None:
    """Run aaa comes back, with the very files that were superseded, between the listing and the removal."""
    output = Store(str(tmp_path))
    make_lake(output)
    age(tmp_path)
    real, come_back = leases.try_acquire, ["2026-01-02-aaa"]

    def slowly(store: Store, name: str, owner: str, seconds: float) -> leases.Lease | None:
        if come_back and come_back[0] in name:
            come_back.clear()
            run, shards = make_run(output, "aaa")
            publish_night(run, "m1", run.shards, shards, output, "aaa")
        return real(store, name, owner, seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases, "try_acquire", slowly)
        list(collect_garbage(output, DAY_S, delete=True))
    commit = read_commit(output, NIGHT)
    assert commit is not None and commit.run_id == "2026-01-02-aaa"
    assert kept_by_commit(output) <= keys(output)
    assert {f"runs/2026-01-02-aaa/shards/{shard}.arrow" for shard in ("one", "two")} <= keys(output)


def test_the_command_counts_by_kind_and_removes_only_when_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Store(str(tmp_path))
    make_lake(output)
    age(tmp_path)
    before, console = keys(output), Console(record=True, width=100)
    assert run_gc(output, console, 24, delete=False) == 0
    shown = console.export_text()
    assert keys(output) == before and "nothing was removed" in shown
    counts = {
        line.split("│")[1].strip(): line.split("│")[2].strip() for line in shown.splitlines() if line.count("│") == 4
    }
    assert counts["shards"] == "4" and counts["masks"] == counts["maps"] == "3" and counts["manifests"] == "3"
    capsys.readouterr()
    assert run_gc(output, console, 24, delete=False, as_json=True) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["deleted"] is False
    assert {kind: found["files"] for kind, found in document["kinds"].items()} == {
        kind: int(counts[kind]) for kind in counts if kind not in ("kind", "all")
    }
    assert document["files"] == int(counts["all"])
    assert document["bytes"] == sum(found["bytes"] for found in document["kinds"].values()) > 0
    assert keys(output) == before
    assert run_gc(output, console, 24, delete=True) == 0 and len(keys(output)) < len(before)


def test_without_any_commit_nothing_is_removed(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    make_run(output, "aaa")
    age(tmp_path)
    before, console = keys(output), Console(record=True)
    assert run_gc(output, console, 24, delete=True) == 0
    assert keys(output) == before and "no night is published" in console.export_text()
