"""Tests that after any process dies at any time, the same command again gives one row and mask for every image."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray.cluster_utils import Cluster

from pipeline.storage import STAGING
from tests.clusters import run_cluster
from tests.command import COMMAND, Ended, alfa, alfa_alone
from tests.llm_server import LLMServer
from tests.nights import NIGHT
from tests.places import DEMO
from tests.processes import kill_processes
from tests.shared_ray import share_ray

SHARDS = 9

DRIVER_POINTS = [
    "after:^prompts/.*json$:1",
    "before:job.yaml:1",
    "before:manifest-:1",
    "shard:1",
    f"shard:{SHARDS // 2}",
    f"shard:{SHARDS}",
    "after:/table-:1",
    "after:^scores/:1",
    "before:^scores/.*stale:1",
    "before:^ledger/:1",
    "after:^ledger/:1",
    "before:^commits/:1",
    "after:^commits/:1",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's 24 images, and one that is none: 25 images in four shards of five and five of one."""
    folder = tmp_path_factory.mktemp("images")
    for path in DEMO.glob("*/test/*/*.jpg"):
        target = folder / path.parts[-4] / f"{path.parts[-2]}-{path.name}"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    (folder / "hazelnut" / "broken.jpg").write_bytes(b"broken")
    return folder


def arguments(images: Path, output: Path, *overrides: str) -> list[str]:
    wanted = (
        "engine.shard_size=5",
        "engine.lease_s=1",
        "engine.max_error_rate=1",
        "threshold.policy=quantile",
        "model.image_size=98",  # what is tested does not depend on it, and the night ends sooner
    )
    sets = [part for override in (*wanted, *overrides) for part in ("--set", override)]
    return ["score", "--images", str(images), "--output", str(output), "--run-date", NIGHT, *sets]


def published(output: Path) -> list[dict[str, Any]]:
    """The rows of the table without scored_at and with the pixels of their masks, in the order of their images."""
    tables = [pq.read_table(path, partitioning=None) for path in sorted(output.glob("scores/**/*.parquet"))]
    rows = pa.concat_tables(tables).drop_columns(["scored_at"]).to_pylist()
    for row in rows:
        uri = row.pop("mask_uri")
        row["mask"] = None if uri is None else np.asarray(Image.open(uri)).tobytes()
    return sorted(rows, key=lambda row: str(row["image_uri"]))


def score(*command: str) -> Ended:
    """A night that nothing dies in, on the Ray of this process. One actor: each imports torch for seconds."""
    share_ray()
    return alfa(*command, "--set", "engine.actors=1")


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("undisturbed")
    done = score(*arguments(images, output))
    assert done.returncode == 0, done.stderr
    rows = published(output)
    assert len(rows) == 25 and sum(row["status"] == "ok" for row in rows) == 24
    return rows


def killed(point: str, *command: str) -> Ended:
    return subprocess.run(
        [sys.executable, "-m", "tests.killed_driver", point, *command], capture_output=True, text=True, timeout=240
    )


def check_night(output: Path, undisturbed: list[dict[str, Any]]) -> None:
    assert published(output) == undisturbed
    assert sorted(path.name for path in output.glob("scores/*/*/*")) == ["part-00000.parquet"] * 2
    assert len(list(output.glob("commits/*"))) == 1
    assert len(list((output / STAGING).glob("*"))) <= 1  # what the killed one was writing; no reader looks there


def shard_times(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in output.glob("runs/*/shards/*.arrow")}


def kill_and_run_again(point: str, images: Path, output: Path, undisturbed: list[dict[str, Any]]) -> None:
    command = arguments(images, output)
    if "stale" in point:
        stale = output / f"scores/run_date={NIGHT}/class_name=stale/part-00000.parquet"
        stale.parent.mkdir(parents=True)
        stale.write_bytes(b"of a run that this one replaces")
    assert killed(point, *command).returncode == -signal.SIGKILL
    before = shard_times(output)
    again = score(*command)
    assert again.returncode == 0, again.stderr
    check_night(output, undisturbed)
    after = shard_times(output)
    assert {name: after[name] for name in before} == before and len(after) == SHARDS


def test_a_driver_killed_in_mid_run_is_resumed(images: Path, undisturbed: list[dict[str, Any]], tmp_path: Path) -> None:
    kill_and_run_again("shard:2", images, tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("point", DRIVER_POINTS)
def test_a_driver_killed_anywhere_is_resumed(
    point: str, images: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    kill_and_run_again(point, images, tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["before:^scores/:1", "after:^scores/:1", "before:^commits/:1"])
def test_a_driver_killed_while_it_replaces_a_night_leaves_the_old_one_to_those_who_follow_the_commit(
    point: str, images: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert score(*arguments(images, tmp_path, "threshold.policy=fixed")).returncode == 0
    commit = tmp_path / "commits" / f"{NIGHT}.json"
    before = commit.read_bytes()
    assert killed(point, *arguments(images, tmp_path)).returncode == -signal.SIGKILL
    assert commit.read_bytes() == before
    for entry in json.loads(before)["files"]:
        assert hashlib.sha256((tmp_path / entry["key"]).read_bytes()).hexdigest() == entry["sha256"]
    again = score(*arguments(images, tmp_path))
    assert again.returncode == 0, again.stderr
    check_night(tmp_path, undisturbed)


@pytest.mark.slow
def test_killed_workers_are_replaced_and_the_run_goes_on(
    images: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    done = killed("workers:2", *arguments(images, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "a scoring worker died and is replaced" in done.stderr
    check_night(tmp_path, undisturbed)


@pytest.mark.slow
def test_workers_that_die_again_and_again_end_the_job_and_the_next_resumes(
    images: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    command = arguments(images, tmp_path)
    stopped = killed("workers:1", *command, "--set", "engine.max_restarts=0")
    assert stopped.returncode == 1 and "engine.max_restarts (0)" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    again = score(*command)
    assert again.returncode == 0 and "shards are finished already" in again.stderr
    check_night(tmp_path, undisturbed)


_BMP_KILLS = """
import ctypes
from PIL import BmpImagePlugin
BmpImagePlugin.BmpImageFile._open = lambda self: ctypes.string_at(0)  # unlike os.kill, it ends this very thread
"""

_BMP_HANGS = """
import ctypes, faulthandler, threading
from PIL import BmpImagePlugin
BmpImagePlugin.BmpImageFile._open = lambda self: ctypes.PyDLL(None).sleep(1000)  # PyDLL: with the interpreter's lock
wait, timer = faulthandler.dump_traceback_later, threading.Timer
faulthandler.dump_traceback_later = lambda limit, exit: wait(limit / 20, exit=exit)
threading.Timer = lambda limit, *a, **k: timer(limit / 20 if limit == 300 else limit, *a, **k)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "killers", "word"),
    [
        (_BMP_KILLS, ["hazelnut/a"], "SIGSEGV"),
        (_BMP_KILLS, ["capsules/a", "capsules/n", "hazelnut/a", "hazelnut/n", "hazelnut/z"], "SIGSEGV"),
        (_BMP_HANGS, ["hazelnut/a"], "did not end"),
    ],
    ids=["killer", "killers", "hangs"],
)
def test_images_that_kill_their_decoder_cost_their_own_rows_alone(
    deed: str, killers: list[str], word: str, images: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The decoder of BMP is broken in all processes, as by a bug in a codec: it ends them, or never ends."""
    poisoned, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(images, poisoned)
    for killer in killers:
        Image.new("RGB", (40, 30)).save(poisoned / f"{killer}.bmp")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(deed)
    done = alfa_alone(*arguments(poisoned, output), PYTHONPATH=f"{tmp_path / 'site'}:{Path.cwd()}")
    assert done.returncode == 0, done.stderr
    rows = published(output)
    dead = [row for row in rows if row["image_uri"].endswith(".bmp")]
    assert [row["error_type"] for row in dead] == ["crashed"] * len(killers)
    assert all(word in row["error_message"] for row in dead)
    others = [(Path(row["image_uri"]).name, row["status"], row["error_type"]) for row in rows if row not in dead]
    assert others == [(Path(row["image_uri"]).name, row["status"], row["error_type"]) for row in undisturbed]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without cores, and a node with one."""
    with run_cluster(1) as started:
        yield started


@pytest.mark.slow
def test_the_loss_of_a_node_is_survived_by_the_others(
    images: Path, undisturbed: list[dict[str, Any]], cluster: Cluster, tmp_path: Path
) -> None:
    doomed = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    command = [*COMMAND, *arguments(images, tmp_path, "engine.shard_size=1", "engine.actors=2")]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while len(shard_times(tmp_path)) < 3:
            assert driver.poll() is None, (tmp_path / "log").read_text()
        cluster.remove_node(doomed)
        assert driver.wait(240) == 0, (tmp_path / "log").read_text()
    assert re.search("a scoring worker died( with its node)? and is replaced", (tmp_path / "log").read_text())
    rows = published(tmp_path)
    for row, expected in zip(rows, undisturbed, strict=True):
        assert (row["image_uri"], row["status"]) == (expected["image_uri"], expected["status"])
        assert row["score"] == pytest.approx(expected["score"], abs=1e-5)


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_the_same_night_submitted_twice_at_once_is_scored_once(
    images: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    command = arguments(images, tmp_path, "engine.lease_s=30")
    other = start(*command)
    here = score(*command)
    _, error = other.communicate(timeout=240)
    assert (here.returncode, other.returncode) == (0, 0), here.stderr + error
    words = [("already published; nothing to do" in log, "works on run" in log) for log in (here.stderr, error)]
    assert sorted(words) == [(False, False), (True, True)] or sorted(words) == [(False, False), (True, False)]
    check_night(tmp_path, undisturbed)


@pytest.mark.slow
def test_two_jobs_that_share_an_output_leave_one_whole_night(images: Path, tmp_path: Path) -> None:
    jobs = [("threshold.policy=fixed", f"threshold.value={value}") for value in (0.4, 0.6)]
    drivers = [start(*arguments(images, tmp_path, *overrides)) for overrides in jobs]
    outcomes = [(*driver.communicate(timeout=240), driver.returncode) for driver in drivers]
    assert [code for *_, code in outcomes] == [0, 0], outcomes
    assert sum("this run replaces it" in error for _, error, _ in outcomes) == 1
    commit = json.loads((tmp_path / "commits" / f"{NIGHT}.json").read_text())
    rows = published(tmp_path)
    assert {row["run_id"] for row in rows} == {commit["run_id"]} and len(rows) == 25
    for row in rows:
        if row["status"] == "ok":
            assert np.frombuffer(row["mask"], np.uint8).mean() / 255 == pytest.approx(row["mask_area"], abs=1e-6)


@pytest.mark.slow
def test_a_prompt_actor_killed_in_mid_call_asks_once_more_when_its_lease_is_over(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    kills: list[int] = []

    def kill_first(class_name: str) -> None:
        if not kills:
            kills.append(kill_processes("ray::PromptActor", os.getpid()))

    with LLMServer(on_request=kill_first) as server:
        done = alfa_alone(
            *arguments(images / "hazelnut", tmp_path, f"prompts.api_base={server.api_base}"),
            "--layout", "flat", "--class", "nut", "--llm", "openai/test",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert kills == [1] and server.requests == {"nut": 2}
    assert {row["prompt_source"] for row in published(tmp_path)} == {"llm"}
    left = [path.name for path in (tmp_path / "prompts").rglob("*") if path.is_file()]
    assert len(left) == 1 and "lease" not in left[0]
