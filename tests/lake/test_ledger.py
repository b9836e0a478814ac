"""Tests that a night leaves out exactly the photos in other nights' commits, whatever files are in the ledger."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jobs.ledger import run_ledger
from pipeline.lake import (
    Selection,
    collect_garbage,
    find_ledgers,
    ledger,
    read_commit,
    read_known,
    write_ledger,
)
from pipeline.prompts import compose_ensemble, make_offline, record_prompts
from pipeline.storage import Store, paths
from schemas.job import dump_job_yaml, parse_job
from schemas.tables import LEDGER
from tests.lake.nights import METHOD, OTHER, left, photos_named, publish
from tests.nights import FIRST, SECOND, THIRD


def test_a_photo_is_known_by_address_version_class_and_what_it_was_scored_as(tmp_path: Path) -> None:
    output, selection = Store(str(tmp_path)), Selection()
    publish(output, FIRST, dict.fromkeys(photos_named("a", "b"), "ok"))
    publish(output, SECOND, dict.fromkeys(photos_named("c"), "ok"))
    listed = [*photos_named("a", "b", "c", "d"), ("a", "v2")]
    assert left(output, listed, selection=selection) == [("d", "v1"), ("a", "v2")]
    assert (selection.listed, selection.scored, selection.given_up) == (5, 3, 0)
    assert left(output, listed, {"nut": OTHER}) == listed
    assert left(output, listed, {"bolt": METHOD}) == listed  # no fingerprint of tonight's class
    assert left(Store(str(tmp_path / "another")), listed) == listed


def test_classes_and_methods_that_take_turns_are_told_apart(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    a, b = photos_named("a", "b")
    publish(output, FIRST, {a: "ok", b: "ok"}, {"nut": METHOD, "bolt": OTHER}, class_of={b: "bolt"})
    publish(output, SECOND, {b: "ok"}, {"nut": OTHER})
    marks = {"nut": METHOD, "bolt": OTHER}
    assert left(output, [a, b], marks) == [b]  # listed as a nut, b was scored as another class, or by another method
    assert left(output, [a, b], marks, class_name="bolt") == [a]
    assert left(output, [a, b], {"nut": OTHER}) == [a]


def test_photos_of_another_depth_are_scored_again(tmp_path: Path) -> None:
    """A class was taken for 10 bits one night and for 12 the next; photos of 8 bits depend on neither."""
    output = Store(str(tmp_path))
    ten, shallow, twelve, late = photos_named("ten", "shallow", "twelve", "late")
    marks = {"nut": METHOD}
    publish(output, FIRST, {ten: "ok"}, marks, spans={"nut": (0, 1023)})
    assert left(output, [ten, late]) == [late]
    publish(output, SECOND, {shallow: "ok"}, marks)
    assert left(output, [ten, shallow, late]) == [late]
    publish(output, THIRD, {twelve: "ok"}, marks, spans={"nut": (0, 4095)})
    assert left(output, [ten, shallow, twelve, late]) == [ten, late]
    publish(output, FIRST, {ten: "ok"}, {"nut": OTHER}, spans={"nut": (0, 1023)})
    known = [read_known(output, find_ledgers(output), {"nut": mark}, 1).spans for mark in (METHOD, OTHER, "c" * 32)]
    assert known == [{"nut": (0, 4095)}, {"nut": (0, 1023)}, {}]


def test_the_night_itself_does_not_count_so_that_it_can_be_done_again(tmp_path: Path) -> None:
    output, photos = Store(str(tmp_path)), photos_named("a", "b")
    publish(output, FIRST, {photos[0]: "ok"})
    publish(output, SECOND, {photos[1]: "ok"})
    assert left(output, photos, tonight=SECOND) == [photos[1]]
    assert left(output, photos, tonight=FIRST) == [photos[0]]


def test_errors_are_tried_again_for_as_many_nights_as_asked_for(tmp_path: Path) -> None:
    output, selection = Store(str(tmp_path)), Selection()
    mended, broken, vanished = photos_named("mended", "broken", "vanished")
    publish(output, FIRST, {mended: "error", broken: "error", vanished: "error"})
    publish(output, SECOND, {mended: "ok", broken: "error"})
    listed = [mended, broken, vanished]
    assert left(output, listed, error_nights=1) == []
    assert left(output, listed, error_nights=2, selection=selection) == [vanished]
    assert (selection.scored, selection.given_up) == (1, 1)
    assert left(output, listed, error_nights=3) == [broken, vanished]


def test_a_night_published_again_counts_as_it_is_now(tmp_path: Path) -> None:
    output, photos = Store(str(tmp_path)), photos_named("a", "b")
    publish(output, FIRST, dict.fromkeys(photos, "ok"))
    publish(output, FIRST, {photos[0]: "ok"}, run="another")
    assert len(list(output.list("ledger"))) == 2  # that of the replaced commit is there, and says nothing
    assert left(output, photos) == [photos[1]]
    output.delete(paths.commit_key(date.fromisoformat(FIRST)))
    assert left(output, photos) == photos


def test_a_ledger_that_is_missing_is_made_from_the_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output, scratch, photos = Store(str(tmp_path / "lake")), Store(str(tmp_path / "scratch")), photos_named("a", "b")
    publish(output, FIRST, {photos[0]: "ok", photos[1]: "error"})
    (file,) = output.list("ledger")
    written = output.read(file.key)
    output.delete(file.key)
    assert left(output, photos, mended=scratch) == [photos[1]] and "ledger of night 2026-01-01" in caplog.text
    assert not output.exists(file.key)
    assert left(output, photos) == [photos[1]] and output.read(file.key) == written


def test_rows_of_a_version_that_wrote_no_fingerprints_are_known_by_the_run_s_folder(tmp_path: Path) -> None:
    output, photos = Store(str(tmp_path)), photos_named("a")
    commit = publish(output, FIRST, {photos[0]: "ok"})
    document = json.loads(output.read(paths.commit_key(FIRST)))
    for entry in document["files"]:
        del entry["scored_as"]
    output.write(paths.commit_key(FIRST), json.dumps(document).encode())
    assert left(output, photos) == photos  # the run's folder has gone
    job = parse_job({"dataset": {"images": "x"}, "output": {"uri": output.uri("")}, "run_date": FIRST})
    prompt_set = make_offline("nut")
    ensemble = compose_ensemble(prompt_set, lambda _: True)
    output.write(paths.run_key(commit.run_id, "job.yaml"), dump_job_yaml(job).encode())
    prompts = record_prompts([prompt_set], [ensemble]).model_dump_json().encode()
    output.write(paths.run_key(commit.run_id, "prompts.json"), prompts)
    assert left(output, photos, {"nut": job.class_fingerprint("nut", "0" * 64, ensemble.fingerprint)}) == []
    assert left(output, photos, {"nut": job.class_fingerprint("nut", "1" * 64, ensemble.fingerprint)}) == photos


def test_many_photos_in_many_parts_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_ROWS_PER_GROUP", 64)
    output, random = Store(str(tmp_path)), np.random.default_rng(1)
    listed = photos_named(*(f"photo {number}" for number in range(1000)))
    nights = {night: random.permutation(1000)[:400].tolist() for night in (FIRST, SECOND, THIRD)}
    scored = set()
    for night, numbers in nights.items():
        publish(output, night, {listed[number]: "ok" if number % 5 else "error" for number in numbers})
        scored |= {listed[number] for number in numbers if number % 5}
    (found,) = (info.key for info in output.list(f"ledger/{FIRST}"))
    assert pq.ParquetFile(tmp_path / found).num_row_groups == 7
    assert pq.read_schema(tmp_path / found).equals(LEDGER)
    assert left(output, listed) == [photo for photo in listed if photo not in scored]


def test_rebuilding_finds_no_difference_or_mends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, text = Store(str(tmp_path)), io.StringIO()
    a, b, c = photos_named("a", "b", "c")
    publish(output, FIRST, {a: "ok"})
    publish(output, SECOND, {b: "ok", c: "error"})
    publish(output, THIRD, {})
    publish(output, SECOND, {b: "ok", c: "ok"}, run="another")
    console = Console(file=text, width=120)
    assert run_ledger(output, console, rebuild=True) == 0
    assert "3 nights were made anew from their rows: no difference" in text.getvalue()
    assert "1 files belong to no commit" in text.getvalue()
    first, second = (ledger.key for ledger in find_ledgers(output)[:2])
    output.write(second, output.read(first))
    output.delete(first)
    assert left(output, [b, c]) == [b, c]  # damaged: the file says another night's photos
    assert run_ledger(output, Console(quiet=True), as_json=True) == 0
    document = json.loads(capsys.readouterr().out)
    assert [night["state"] for night in document["nights"]] == ["whole", "whole", "whole"]  # the look above mended one
    output.delete(first)
    run_ledger(output, Console(quiet=True), rebuild=True, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert [(night["night"], night["photos"], night["state"]) for night in document["nights"]] == [
        (FIRST, 1, "missing"),
        (SECOND, 2, "different"),
        (THIRD, 0, "whole"),
    ]
    assert left(output, [a, b, c]) == []
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    removed = [item.key for item in collect_garbage(output, 3600, delete=True) if item.kind == "ledgers"]
    assert len(removed) == 1 and {info.key for info in output.list("ledger")} == {first, second}
    assert left(output, [a, b, c]) == []


KILLED = """
import sys
from tests.killed_driver import kill_around
from tests.lake.nights import photos_named, publish
from tests.nights import FIRST
from pipeline.storage import Store
when, pattern = sys.argv[2:]
kill_around(when, pattern, 1)
publish(Store(sys.argv[1]), FIRST, dict.fromkeys(photos_named("b", "c"), "ok"), run="killed")
"""


@pytest.mark.parametrize("replaces", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("when", "pattern", "counts"),
    [
        ("before", "^ledger/", False),
        ("after", "^ledger/", False),
        ("before", "^commits/", False),
        ("after", "^commits/", True),
    ],
)
def test_a_publisher_that_is_killed_leaves_a_ledger_that_says_what_the_commits_say(
    when: str, pattern: str, counts: bool, replaces: bool, tmp_path: Path
) -> None:
    output, photos = Store(str(tmp_path)), photos_named("a", "b", "c")
    if replaces:
        publish(output, FIRST, dict.fromkeys(photos_named("a", "b"), "ok"))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), when, pattern], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    commit = read_commit(output, FIRST)
    assert (commit is not None) == (replaces or counts)
    expected = photos_named("a") if counts else photos_named("c") if replaces else photos
    assert left(output, photos) == expected
    for found in find_ledgers(output):
        before = output.read(found.key)
        write_ledger(output, found)
        assert output.read(found.key) == before
    for lease in tmp_path.glob("runs/*.claim-*.json"):  # as if the lease of the dead had run out
        lease.write_text(json.dumps({"owner": "dead", "expires_at": 0.0}))
    publish(output, FIRST, dict.fromkeys(photos_named("b", "c"), "ok"), run="killed")
    assert left(output, photos) == photos_named("a")
