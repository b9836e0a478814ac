"""Exports of a published night, read as the tools read them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from pipeline.images import draw_mask, encode_mask, find_regions, split_regions
from pipeline.lake import publish_night
from pipeline.storage import Store, paths
from schemas.job import dump_job_yaml
from tests.command import alfa
from tests.nights import NIGHT, run_of, write_shard

NO_DEFECTS = np.zeros((0, 2, 2), dtype=np.float32)


def make_row(output: Store, images: Path, number: int, mask: np.ndarray) -> dict[str, Any]:
    image = images / "nut" / f"<{number}> & ü.png"
    image.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", (mask.shape[1], mask.shape[0])).save(image)
    key = f"masks/{number}.png"
    drawn = draw_mask(mask.astype(np.float32), mask.shape[1], mask.shape[0], 0.5)
    output.write(key, encode_mask(drawn))
    regions = [asdict(region) for region in find_regions(drawn, [], NO_DEFECTS)]
    for place, region in enumerate(regions):
        region["defect"] = None if place else 'a "crack" <b>'
    return {
        "image_key": image.name, "image_uri": str(image), "status": "ok", "score": number / 10, "width": mask.shape[1],
        "height": mask.shape[0], "mask_uri": output.uri(key), "regions": regions, "is_anomalous": bool(regions),
    }  # fmt: skip


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    """Output, folder of images and rows of a night: random masks, an empty one, one with nested regions, an error."""
    folder = tmp_path_factory.mktemp("night")
    output, images = Store(str(folder / "out")), folder / "in"
    random = np.random.default_rng(0)
    ring = np.zeros((9, 12), dtype=bool)
    ring[1:8, 1:8] = True
    ring[2:7, 2:7] = False
    ring[4, 4] = True
    masks = [random.random((7, 11)) < 0.2, np.zeros((5, 4), dtype=bool), ring, np.ones((3, 6), dtype=bool)]
    rows = [make_row(output, images, number, mask) for number, mask in enumerate(masks)]
    rows.append(
        {"image_key": "broken", "image_uri": str(images / "broken.png"), "status": "error", "error_type": "corrupt"}
    )
    run = run_of(output, "aaa", dataset={"images": str(images)})
    made = [{"class_name": "nut", **row, "image_id": f"{number:032}"} for number, row in enumerate(rows)]
    write_shard(output, run, "one", made)
    output.write(paths.run_key(run.run_id, "job.yaml"), dump_job_yaml(run.job).encode())
    publish_night(run, "m", run.shards, ["one"], output, "test")
    return folder / "out", images, rows


def export(output: Path, target: Path, kind: str, run: str = NIGHT) -> Path:
    done = alfa("export", output, run, "--to", kind, "--output", target)
    assert done.returncode == 0, done.stderr
    assert "4 images" in done.stdout and "1 error rows are left out" in done.stdout
    return target


def test_coco_results_decode_to_the_masks(night: tuple[Path, Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    output, images, rows = night
    folder = export(output, tmp_path, "coco")
    truth = COCO(str(folder / "images.json"))
    found = truth.loadRes(str(folder / "results.json"))
    by_name = {str(images / image["file_name"]): image for image in truth.dataset["images"]}
    assert sorted(by_name) == sorted(row["image_uri"] for row in rows if row["status"] == "ok")
    for row in (row for row in rows if row["status"] == "ok"):
        image = by_name[row["image_uri"]]
        mask = np.asarray(Image.open(row["mask_uri"])) > 0
        results = found.loadAnns(found.getAnnIds(imgIds=[image["id"]]))
        parts = [found.annToMask(result) for result in results]
        np.testing.assert_array_equal(np.sum([np.zeros(mask.shape, int), *parts], axis=0), mask)  # disjoint, and whole
        assert [result["bbox"] for result in results] == [
            [region[key] for key in ("x", "y", "width", "height")] for region in row["regions"]
        ]
        assert (image["width"], image["height"]) == (mask.shape[1], mask.shape[0])
    assert {category["name"] for category in truth.dataset["categories"]} == {"nut: anomaly", 'nut: a "crack" <b>'}


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=24), elements=st.booleans()))
def test_regions_of_any_mask_are_disjoint_and_make_it_up(mask: np.ndarray) -> None:
    drawn = draw_mask(mask.astype(np.float32), mask.shape[1], mask.shape[0], 0.5)
    regions = [asdict(region) for region in find_regions(drawn, [], NO_DEFECTS)]
    codes = [rle.encode(np.asfortranarray(part, dtype=np.uint8)) for _, part in split_regions(mask, regions)]
    assert len(codes) == len(regions)
    decoded = np.sum([np.zeros(mask.shape, int), *(rle.decode(code) for code in codes)], axis=0)
    np.testing.assert_array_equal(decoded, mask)
    assert [int(rle.area(code)) for code in codes] == [region["area"] for region in regions]


def test_fiftyone_samples_follow_the_importer(night: tuple[Path, Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """FiftyOneDatasetImporter: without `version` the fields are inferred from samples, whose paths may be absolute."""
    output, _, rows = night
    folder = export(output, tmp_path, "fiftyone", f"{NIGHT}-aaa")
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["media_type"] == "image" and not {"version", "sample_fields"} & metadata.keys()
    samples = {sample["filepath"]: sample for sample in json.loads((folder / "samples.json").read_text())["samples"]}
    assert len(samples) == 4 and all(Path(path).is_file() for path in samples)
    for row in (row for row in rows if row["status"] == "ok"):
        sample = samples[row["image_uri"]]
        assert Path(sample["mask"]["mask_path"]).is_file() and sample["mask"]["_cls"] == "Segmentation"
        assert sample["score"] == pytest.approx(row["score"]) and sample["tags"] == ["nut"]
        boxes = sample["regions"]["detections"]
        assert [box["_cls"] for box in boxes] == ["Detection"] * len(row["regions"])
        for box, region in zip(boxes, row["regions"], strict=True):
            x, y, width, height = box["bounding_box"]
            assert 0 <= x < x + width <= 1 + 1e-9 and 0 <= y < y + height <= 1 + 1e-9
            assert (x * row["width"], height * row["height"]) == pytest.approx((region["x"], region["height"]))


@pytest.mark.slow
def test_fiftyones_own_importer_reads_the_samples(
    night: tuple[Path, Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader that Dataset.from_dir takes for such folders; a dataset itself would need a MongoDB."""
    monkeypatch.setenv("FIFTYONE_DO_NOT_TRACK", "1")
    monkeypatch.setenv("FIFTYONE_CONFIG_PATH", str(tmp_path / "config.json"))
    reason = "pip install fiftyone 'graphql-core<3.3' (about 1 GB)"
    importers = pytest.importorskip("fiftyone.utils.data.importers", reason=reason, exc_type=ImportError)
    output, _, rows = night
    importer = importers.LegacyFiftyOneDatasetImporter(str(export(output, tmp_path / "night", "fiftyone")))
    with importer:
        samples = {sample.filepath: sample for sample in importer}
    assert sorted(samples) == sorted(row["image_uri"] for row in rows if row["status"] == "ok")
    for row in (row for row in rows if row["status"] == "ok"):
        sample = samples[row["image_uri"]]
        assert sample.tags == ["nut"] and sample["score"] == pytest.approx(row["score"])
        assert sample["verdict"].label == ("anomalous" if row["is_anomalous"] else "normal")
        np.testing.assert_array_equal(sample["mask"].get_mask() > 0, np.asarray(Image.open(row["mask_uri"])) > 0)
        assert [box.label for box in sample["regions"].detections] == [
            region["defect"] or "anomaly" for region in row["regions"]
        ]
        marked = [box.bounding_box for box in sample["regions"].detections]
        size = (row["width"], row["height"]) * 2
        wanted = [[region[key] for key in ("x", "y", "width", "height")] for region in row["regions"]]
        np.testing.assert_allclose(np.reshape(marked, (-1, 4)) * size, np.reshape(wanted, (-1, 4)))


def test_label_studio_tasks_have_predictions_in_per_cent(
    night: tuple[Path, Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    output, *_ = night
    folder = export(output, tmp_path, "labelstudio")
    tasks = {task["data"]["image_id"]: task for task in json.loads((folder / "tasks.json").read_text())}
    config = ElementTree.parse(folder / "label_config.xml").getroot()
    assert [label.get("value") for label in config.iter("Label")] == ['a "crack" <b>', "anomaly"]
    (task,) = (task for task in tasks.values() if task["data"]["image"].endswith("%3C3%3E%20%26%20%C3%BC.png"))
    (prediction,) = task["predictions"]
    assert prediction["score"] == pytest.approx(0.3) and prediction["model_version"] == f"model {NIGHT}-aaa"
    (result,) = prediction["result"]
    assert result["value"] == {
        "x": 0.0, "y": 0.0, "width": 100.0, "height": 100.0, "rotation": 0, "rectanglelabels": ['a "crack" <b>'],
    }  # fmt: skip
    assert (result["original_width"], result["original_height"]) == (6, 3)
    assert result["to_name"] == config.find("Image").get("name") and result["from_name"] == config[1].get("name")
    assert len(tasks) == 4


@pytest.mark.slow
def test_label_studios_own_validator_takes_the_tasks(
    night: tuple[Path, Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    sdk = pytest.importorskip("label_studio_sdk.label_interface", reason="pip install label-studio-sdk")
    folder = export(night[0], tmp_path, "labelstudio")
    interface = sdk.LabelInterface((folder / "label_config.xml").read_text())
    interface.validate()
    tasks = json.loads((folder / "tasks.json").read_text())
    predictions = [prediction for task in tasks for prediction in task["predictions"]]
    assert all(interface.validate_task({"data": task["data"]}) for task in tasks)
    assert all(map(interface.validate_prediction, predictions))
    wrong = next(prediction for prediction in predictions if prediction["result"])
    wrong["result"][0]["from_name"] = "nobody"
    assert not interface.validate_prediction(wrong)


def test_by_default_an_export_lies_in_the_output(night: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    assert alfa("export", night[0], NIGHT, "--to", "labelstudio").returncode == 0
    assert (night[0] / "exports" / f"{NIGHT}-aaa" / "labelstudio" / "tasks.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["2026-01-03", "--to", "coco"], "night 2026-01-03 is not published"),
        ([f"{NIGHT}-bbb", "--to", "coco"], f"published by {NIGHT}-aaa"),
        (["yesterday", "--to", "coco"], "neither a night"),
        ([NIGHT, "--to", "voc"], "'coco', 'fiftyone', 'labelstudio'"),
    ],
)
def test_what_cannot_be_exported_is_one_clear_line(
    night: tuple[Path, Path, list[dict[str, Any]]], arguments: list[str], message: str
) -> None:
    refused = alfa("export", night[0], *arguments)
    assert refused.returncode == 2 and message in refused.stderr and "Traceback" not in refused.stderr
