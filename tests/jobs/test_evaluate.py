"""Tests `alfa evaluate` on the demo's real images, and that it scores as `alfa score` does."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.compare import describe_base, expand
from pipeline.evaluation import PUBLISHED
from pipeline.evaluation.measure import METRICS
from schemas.job import JobError, parse_job
from schemas.tables import EVALUATION
from tests.command import Ended, alfa
from tests.places import DEMO
from tests.shared_ray import share_ray

JOB = parse_job({"dataset": {"images": "in"}, "output": {"uri": "out"}})


def evaluate(*arguments: str | Path) -> Ended:
    return alfa("evaluate", *arguments)


def evaluation_of(output: Path) -> tuple[Path, dict[str, Any]]:
    (folder,) = output.glob("runs/*/evaluation")
    return folder, json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished demo, and what the demo printed."""
    folder = tmp_path_factory.mktemp("demo")
    share_ray()
    shown = alfa("demo", "--output", folder)
    assert shown.returncode == 0, shown.stderr
    return folder, shown.stdout


def test_the_demo_scores_its_images_and_says_where_everything_lies(demo: tuple[Path, str]) -> None:
    folder, said = demo
    assert "24, 24 ok" in said and "most anomalous images" in said
    assert str(folder / "scores") in said
    assert len(list((folder / "masks").rglob("*.png"))) == 24
    (report,) = folder.glob("runs/*/report/index.html")
    assert f"report  {report}" in said
    assert "Embedded model." in report.read_text() and "hold all 24 scored images" in report.read_text()


@pytest.mark.slow
def test_a_finished_run_measures_as_its_images_scored_anew(demo: tuple[Path, str], tmp_path: Path) -> None:
    """Of the demo, one class; each class is scored by itself, so the other moves nothing."""
    night, _ = demo
    (run,) = (night / "runs").glob("*-*[0-9a-f]")
    shutil.copytree(DEMO / "hazelnut", tmp_path / "in" / "hazelnut")
    same = ("--layout", "mvtec", "--set", "model.image_size=448")
    from_run = evaluate("--output", night, "--run", run.name)
    anew = evaluate("--images", tmp_path / "in", "--output", tmp_path / "out", *same)
    assert from_run.returncode == anew.returncode == 0, from_run.stderr + anew.stderr
    (of_run, one), (folder, other) = evaluation_of(night), evaluation_of(tmp_path / "out")
    assert [row["class_name"] for row in one["rows"] if row["level"] == "class"] == ["capsules", "hazelnut"]
    found, again = ([row for row in rows["rows"] if row["class_name"] == "hazelnut"] for rows in (one, other))
    assert [row["label"] for row in again] == [None, "colour"]
    for row, expected in zip(found, again, strict=True):
        assert (row["level"], row["label"]) == (expected["level"], expected["label"])
        for metric in METRICS:
            # batches of another size round otherwise
            assert row[metric] == pytest.approx(expected[metric], abs=2e-3), metric
    assert other["embedded_model"] is True and "the model that comes with alfa" in anew.stdout
    table = pq.read_table(folder / "metrics.parquet")
    assert table.schema.equals(EVALUATION) and table.to_pylist() == other["rows"]
    assert pq.read_table(folder / "images.parquet").num_rows == 12
    text = (of_run / "metrics.md").read_text()
    for name in ("curves.png", "scores.png", "failures/good-0.png"):
        assert f"]({name})" in text and (of_run / name).read_bytes().startswith(b"\x89PNG")
    assert (
        "the model that comes with alfa" in text
        and "the model that comes with alfa" in (of_run / "evaluation.html").read_text()
    )


def test_compare_shows_configurations_beside_published_rows(tmp_path: Path) -> None:
    done = evaluate("--preset", "mvtec", "--model", "alfa-small", "--images", DEMO, "--output", tmp_path,
        "--compare", "method.adaptation=none,mean", "--compare", "prompts.described=false method.local_weight=0,1",
        "--set", "peers=none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder, document = evaluation_of(tmp_path)
    means = {row["configuration"]: row for row in document["rows"] if row["level"] == "mean"}
    assert list(means) == [
        "base",
        "adaptation=none",
        "described=false local_weight=0",
        "described=false local_weight=1",
    ]
    assert "base: adaptation=mean, described=True, local_weight=0.5" in done.stdout
    assert "WinCLIP (ViT-B-16-plus-240)" in done.stdout and "91.8" in done.stdout
    # w changes the image score and not the map; the adaptation changes both
    without = means["described=false local_weight=0"], means["described=false local_weight=1"]
    assert (
        without[0]["pixel_auroc"] == without[1]["pixel_auroc"]
        and without[0]["image_auroc"] != without[1]["image_auroc"]
    )
    assert means["base"]["pixel_auroc"] != means["adaptation=none"]["pixel_auroc"]
    assert document["jobs"]["adaptation=none"]["method"]["adaptation"] == "none"
    assert document["jobs"]["base"]["dataset"]["layout"] == "mvtec"
    assert "## Published (MVTec AD, 15 classes)" in (folder / "metrics.md").read_text()


def test_a_table_with_labels_and_masks_and_a_broken_image(tmp_path: Path) -> None:
    root = DEMO / "hazelnut"
    rows = [(path, "good", "") for path in sorted((root / "test" / "good").iterdir())]
    kind = next(path.name for path in (root / "ground_truth").iterdir())
    for path in sorted((root / "test" / kind).iterdir()):
        rows.append((path, kind, next((root / "ground_truth" / kind).glob(f"{path.stem}_mask.*"))))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    rows.append((tmp_path / "broken.png", "<script>|", ""))
    with (tmp_path / "in.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("uri", "class_name", "label", "mask_uri"))
        writer.writerows((uri, "hazel|<b>nut</b>", label, mask) for uri, label, mask in rows)
    done = evaluate("--images", tmp_path / "in.csv", "--output", tmp_path / "out")
    assert done.returncode == 1, done.stderr  # one of 13 is more than 5 %
    folder, document = evaluation_of(tmp_path / "out")
    (row,) = (row for row in document["rows"] if row["level"] == "class")
    assert (row["good"], row["anomalous"], row["errors"]) == (6, 6, 1) and row["pixel_pro"] is not None
    assert "broken.png is left out" in done.stderr and "1 images could not be scored" in done.stdout
    assert (
        "<b>" not in (folder / "metrics.md").read_text() and "<script>" not in (folder / "evaluation.html").read_text()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "flat", "--layout", "folders"], "has a label"),
        (["--images", str(DEMO), "--compare", "method.adaptation"], "write it as key=value"),
        (["--images", str(DEMO), "--compare", "method.aligner=raw,sharp"], "method.aligner"),
        (["--images", str(DEMO), "--compare", "dataset.max_pixels=5"], "the same images"),
        (["--images", str(DEMO), "--preset", "mvtek"], "'mvtek' is not one of 'mvtec', 'visa'"),
        (["--run", "2026-01-02-0123"], "there is no run 2026-01-02-0123"),
        (["--run", "2026-01-02-0123", "--images", "x"], "--run needs --output"),
    ],
)
def test_bad_usage_is_exit_code_2_and_a_clear_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    shutil.copytree(DEMO / "hazelnut" / "test" / "good", tmp_path / "flat" / "nut")
    arguments = [str(tmp_path / "flat") if item == "flat" else item for item in arguments]
    refused = evaluate("--output", tmp_path / "out", *arguments)
    assert refused.returncode == 2 and message in refused.stderr, refused.stderr


def test_comparisons_are_lists_of_grids_without_repeats() -> None:
    found = expand(JOB, ["method.adaptation=none,mean", "method.levels=[-1,-2],[-1] method.local_weight=0,1"])
    assert list(found) == [
        "base", "adaptation=none", "levels=[-1,-2] local_weight=0", "levels=[-1,-2] local_weight=1",
        "levels=[-1] local_weight=0", "levels=[-1] local_weight=1",
    ]  # fmt: skip
    assert found["levels=[-1,-2] local_weight=0"].method.levels == (-1, -2)
    assert list(expand(JOB, ["method.aligner=raw"])) == ["base"]  # what the embedded model uses anyway
    assert describe_base(JOB, ["method.aligner=value method.value_depth=2"]) == "aligner=raw, value_depth=default"
    with pytest.raises(JobError, match=r"did you mean method\.aligner"):
        expand(JOB, ["method.alinger=raw"])


def test_published_rows_were_read_where_they_say() -> None:
    """Nothing that was only recalled, so no row of ALFA itself; WinCLIP and MuSc as their papers have them."""
    first, musc = PUBLISHED["visa"][0], PUBLISHED["mvtec"][3]
    assert (first.method, first.image_auroc, first.pixel_pro) == ("WinCLIP", 78.1, 56.8)
    assert (musc.method, musc.image_auroc, musc.pixel_pro) == ("MuSc", 97.8, 93.8)
    for rows in PUBLISHED.values():
        assert all(row.source.startswith("https://") for row in rows)
        assert {row.method for row in rows} == {"WinCLIP", "WinCLIP+", "MuSc"}


@pytest.mark.slow
def test_shots_are_compared_with_zero_shot(tmp_path: Path) -> None:
    """Two of the good photos become train images; the rest is evaluated with none, one and both of them."""
    shutil.copytree(DEMO / "hazelnut", tmp_path / "in" / "hazelnut")
    train = tmp_path / "in" / "hazelnut" / "train" / "good"
    train.mkdir(parents=True)
    for name in ("00.jpg", "01.jpg"):
        (tmp_path / "in" / "hazelnut" / "test" / "good" / name).rename(train / name)
    arguments = ("--images", tmp_path / "in", "--output", tmp_path / "out", "--shots", "0,1,2")
    shown = evaluate(*arguments, "--set", "method.aligner=ridge", "--set", "peers=none")
    assert shown.returncode == 0, shown.stderr
    _, found = evaluation_of(tmp_path / "out")
    rows = {row["configuration"]: row for row in found["rows"] if row["level"] == "class"}
    assert list(rows) == ["base", "shots=1", "shots=2"] and {row["good"] for row in rows.values()} == {4}
    # What hazelnuts look like tells more than words about them.
    assert rows["shots=2"]["pixel_aupr"] > rows["base"]["pixel_aupr"]
    assert evaluate(*arguments[:4], "--shots", "some").returncode == 2
