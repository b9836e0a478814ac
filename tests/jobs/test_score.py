"""Whole nights through the command line's own code, on real Ray and local files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import duckdb
import pytest

from tests.command import Ended, alfa, alfa_alone, lines_of_others
from tests.llm_server import LLMServer
from tests.nights import NIGHT
from tests.places import DEMO
from tests.shared_ray import share_ray


def arguments(images: Path, output: Path, *overrides: str) -> list[str | Path]:
    sets = [part for override in overrides for part in ("--set", override)]
    return ["score", "--images", images, "--output", output, "--run-date", NIGHT, *sets]


def score(images: Path, output: Path, *overrides: str) -> Ended:
    return alfa(*arguments(images, output, *overrides))


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images and output of a finished night of 12 images and one broken one."""
    folder = tmp_path_factory.mktemp("night")
    for class_name, kind in (("hazelnut", "good"), ("capsules", "anomaly")):
        shutil.copytree(DEMO / class_name / "test" / kind, folder / "in" / class_name)
    (folder / "in" / "hazelnut" / "broken.jpg").write_bytes(b"\xff\xd8 broken")
    (folder / "in" / "hazelnut" / "raw.nef").write_bytes(b"no image to us")
    done = alfa_alone(*arguments(folder / "in", folder / "out", "engine.shard_size=4", "engine.max_error_rate=0.5"))
    assert done.returncode == 0, done.stderr
    assert "layout folders" in done.stderr and "13 images of 2 classes" in done.stderr
    assert lines_of_others(done.stderr) == []
    assert "WARNING" not in done.stderr
    assert "ray" not in done.stdout.replace(str(folder), "")
    assert re.search(r"^   rate  [\d.]+ images/s, over [\d.]+ s of scoring$", done.stdout, re.MULTILINE)
    assert re.search(r"^   time  [\d.]+ s in total", done.stdout, re.MULTILINE)
    assert "12 ok; errors: 1" in done.stdout and "model  alfa-small" in done.stdout
    assert "left out by suffix: 1 .nef" in done.stderr and "skipped  by suffix: 1 .nef" in done.stdout
    assert "Left out by suffix, as not being images: 1 .nef." in next(folder.rglob("index.html")).read_text()
    assert json.loads(next(folder.rglob("stats.json")).read_text())["left_out"] == {".nef": 1}
    return folder / "in", folder / "out"


def test_the_readme_query_reads_the_table(night: tuple[Path, Path]) -> None:
    rows = duckdb.sql(
        f"SELECT class_name, count(*), avg(score) "
        f"FROM read_parquet('{night[1]}/scores/**/*.parquet', hive_partitioning=true) GROUP BY 1 ORDER BY 1"
    ).fetchall()
    assert [(name, count) for name, count, _ in rows] == [("capsules", 6), ("hazelnut", 7)]
    assert all(0 < mean < 1 for *_, mean in rows)


def test_the_same_night_again_is_done_without_scoring(night: tuple[Path, Path]) -> None:
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in night[1].rglob("*") if path.suffix in (".arrow", ".parquet")}

    before = written()
    command = arguments(*night, "engine.shard_size=4", "engine.max_error_rate=0.5")
    again = alfa("--log-format", "json", *command)
    assert again.returncode == 0 and again.stdout == ""
    records = [json.loads(line) for line in again.stderr.splitlines()]
    assert any("already published" in record["message"] for record in records)
    assert re.fullmatch(rf"night {NIGHT} is published: 13 images, \d+ anomalous, 1 errors", records[-1]["message"])
    assert (night[1] / "runs" / records[-1]["run_id"]).is_dir()
    assert written() == before


@pytest.mark.slow
def test_a_lost_shard_alone_is_scored_again_and_published(night: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(night[1], output)
    (output / "commits" / f"{NIGHT}.json").unlink()
    shards = sorted(output.glob("runs/*/shards/*.arrow"))
    kept = {path: path.stat().st_mtime_ns for path in shards[1:]}
    shards[0].unlink()
    share_ray()
    resumed = score(night[0], output, "engine.shard_size=4", "engine.max_error_rate=0.5")
    assert resumed.returncode == 0, resumed.stderr
    assert "3 of 4 shards are finished already" in resumed.stderr
    assert {path: path.stat().st_mtime_ns for path in shards[1:]} == kept and shards[0].exists()
    assert json.loads((output / "commits" / f"{NIGHT}.json").read_text())["rows"] == 13


def test_past_the_error_budget_the_exit_code_is_1_and_rows_are_there(night: tuple[Path, Path], tmp_path: Path) -> None:
    over = score(night[0], night[1], "engine.shard_size=4", "engine.max_error_rate=0.01")
    assert over.returncode == 1 and "max_error_rate" in over.stderr


@pytest.mark.slow
def test_quantile_thresholds_mark_the_share_asked_for(night: tuple[Path, Path], tmp_path: Path) -> None:
    share_ray()
    done = score(night[0], tmp_path, "threshold.policy=quantile", "threshold.quantile=0.5", "engine.max_error_rate=0.5")
    assert done.returncode == 0, done.stderr
    rows = duckdb.sql(
        f"SELECT class_name, count(*) FILTER (is_anomalous), count(*) FILTER (mask_area > 0), count(mask_uri) "
        f"FROM read_parquet('{tmp_path}/scores/**/*.parquet', hive_partitioning=true) GROUP BY 1 ORDER BY 1"
    ).fetchall()
    # Half of six, above the median; a map's peak at source size is at most that of its patches.
    assert [(name, found, masks) for name, found, _, masks in rows] == [("capsules", 3, 6), ("hazelnut", 3, 6)]
    assert all(1 <= marked <= 3 for _, _, marked, _ in rows)


def test_the_rate_of_scoring_is_told_apart_from_the_time_of_the_whole_job(night: tuple[Path, Path]) -> None:
    (folder,) = (night[1] / "runs").glob(f"{NIGHT}-*[0-9a-f]")
    stats = json.loads((folder / "stats.json").read_text())
    assert stats["scored_by_this_job"] == 13
    assert stats["scoring_images_per_second"] == pytest.approx(13 / stats["scoring_seconds"], rel=0.1)
    assert 0 < stats["scoring_seconds"] < stats["total_seconds"]
    assert stats["images_per_second"] < stats["scoring_images_per_second"]


def test_a_run_leaves_its_facts_as_metrics_and_lineage(night: tuple[Path, Path]) -> None:
    (folder,) = (night[1] / "runs").glob(f"{NIGHT}-*[0-9a-f]")
    series = (folder / "metrics.prom").read_text().splitlines()
    assert {"alfa_run_images 13.0", 'alfa_run_state{state="done"} 1.0'} <= set(series)
    assert [line[-4:] for line in series if line.startswith("alfa_run_errors{")] == [" 1.0"]
    event = json.loads((folder / "stats.json").read_text())["lineage"]
    assert (event["eventType"], event["inputs"]) == ("COMPLETE", [{"namespace": "file", "name": str(night[0])}])
    (table,) = event["outputs"]
    assert table["name"] == f"{night[1]}/scores" and table["outputFacets"]["outputStatistics"]["rowCount"] == 13


@pytest.mark.slow
def test_a_calibrated_night_marks_what_its_table_says(tmp_path: Path) -> None:
    """A night with references and their threshold; its scores, labelled by the layout, calibrate the next."""
    shutil.copytree(DEMO / "hazelnut" / "test", tmp_path / "in" / "hazelnut" / "test")
    shutil.copytree(DEMO / "hazelnut" / "test" / "good", tmp_path / "known" / "hazelnut")
    images, output, table = tmp_path / "in", tmp_path / "out", tmp_path / "cut" / "thresholds.json"
    references = (f"references.images={tmp_path / 'known'}", "references.shots=3")
    share_ray()
    first = score(images, output, *references, "threshold.policy=reference")
    assert first.returncode == 0, first.stderr
    (memory,) = output.glob("runs/*/memory/hazelnut.safetensors")
    calibrated = alfa("calibrate", output, memory.parents[1].name, "--table", table)
    assert calibrated.returncode == 0, calibrated.stderr
    second = score(images, output, *references, "threshold.policy=labels", f"threshold.table={table}")
    assert second.returncode == 0, second.stderr
    ((source, shots, threshold, found, false),) = duckdb.sql(
        f"SELECT threshold_source, shots, threshold, sum((is_anomalous AND image_uri LIKE '%colour%')::INT), "
        f"sum((is_anomalous AND image_uri LIKE '%good%')::INT) "
        f"FROM read_parquet('{output}/scores/**/*.parquet') GROUP BY ALL"
    ).fetchall()
    written = json.loads(table.read_text())["classes"]["hazelnut"]
    assert (source, shots, threshold) == (f"labels {table}", 3, pytest.approx(written["score"]))
    assert (found / 6, false / 6) == (written["recall"], written["false_positive_rate"])
    zero_shot = score(images, output, "threshold.policy=labels", f"threshold.table={table}")
    assert zero_shot.returncode == 2 and "other options than the job's" in zero_shot.stderr


def test_status_shows_runs(night: tuple[Path, Path]) -> None:
    shown = alfa("status", night[1])
    assert shown.returncode == 0 and "done, published" in shown.stdout and "4/4" in shown.stdout
    assert "no runs" in alfa("status", night[1] / "elsewhere").stdout


def test_check_passes_where_all_is_well_and_names_what_is_not(night: tuple[Path, Path], tmp_path: Path) -> None:
    share_ray()
    with LLMServer() as server:
        llm = ("--llm", "openai/test", "--set", f"prompts.api_base={server.api_base}", "--ask")
        good = alfa("check", "--images", night[0], "--output", tmp_path, *llm, "--json", OPENAI_API_KEY="")
    assert good.returncode == 0, good.stdout
    assert server.requests == {"": 1}
    assert "openai/test answers 'ready'" in good.stdout
    document = json.loads(good.stdout)
    assert document["passed"] is True
    names = ["images readable", "output writable", "create-only writes", "weights loadable", "LLM", "cluster"]
    assert [(check["name"], check["passed"]) for check in document["checks"]] == [(name, True) for name in names]
    places = ("--images", tmp_path / "none", "--output", "/proc/alfa")
    models = ("--model", "ViT-B-16/no-such-tag", "--llm", "openai/gpt-4o")
    bad = alfa("check", *places, *models, "--ask", OPENAI_API_KEY="")
    assert bad.returncode == 2
    assert [line[:4] for line in bad.stdout.splitlines()] == ["FAIL"] * 5 + ["ok  "]
    for words in ("no images", "output writable", "no-such-tag", "needs OPENAI_API_KEY, and not empty"):
        assert words in bad.stdout


def test_prompts_are_shown_without_scoring(night: tuple[Path, Path], tmp_path: Path) -> None:
    shown = alfa("prompts", "--images", night[0], "--output", tmp_path)
    assert shown.returncode == 0 and "source bundled" in shown.stdout and "defect   crack" in shown.stdout
    assert {path.name for path in tmp_path.iterdir()} - {".staging"} == {"prompts"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "/no/such/folder", "--output", "x"], "no images at /no/such/folder"),
        (["--set", "dataset.images=x", "--set", "outptu.uri=y"], "did you mean output"),
        (["--images", "x"], "output: required"),
        (["no-such-job.yaml"], "no-such-job.yaml cannot be read"),
    ],
)
def test_bad_usage_is_exit_code_2_and_one_clear_line_a_fault(arguments: list[str], message: str) -> None:
    refused = alfa("score", *arguments)
    assert refused.returncode == 2 and message in refused.stderr
    assert "Traceback" not in refused.stderr


def test_an_endpoint_with_a_secret_in_it_is_refused_without_telling_it(tmp_path: Path) -> None:
    refused = alfa("status", tmp_path, "--endpoint", "http://key:planted-77c1@storage")
    assert refused.returncode == 2 and "--endpoint must not hold credentials" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1 and "planted-77c1" not in refused.stderr


@pytest.mark.parametrize(
    ("images", "output"), [("in", "in"), ("in", "in/out/"), ("in/hazelnut", "in"), ("in", "link/out"), ("link", "in/x")]
)
def test_an_output_inside_the_images_is_refused_before_anything_is_written(
    images: str, output: str, tmp_path: Path
) -> None:
    shutil.copytree(DEMO / "hazelnut" / "test" / "good", tmp_path / "in" / "hazelnut")
    (tmp_path / "link").symlink_to("in")
    before = sorted(tmp_path.rglob("*"))
    refused = score(tmp_path / images, tmp_path / output, "lake.format=iceberg")
    assert refused.returncode == 2 and "must not overlap" in refused.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_help_fits_a_screen() -> None:
    lines = alfa("score", "--help").stdout.splitlines()
    assert 10 < len(lines) <= 40
