"""Writes exports: COCO results, a FiftyOne dataset, Label Studio tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from pipeline.images import split_regions
from pipeline.lake.exports.rows import ExportError, Row
from schemas.records import Commit

ANOMALY = "anomaly"
"""The name of a region without a described defect."""


@dataclass
class ExportCount:
    """Counts of an export. errors: rows that were left out because they have no score."""

    images: int = 0
    regions: int = 0
    errors: int = 0


def export_rows(
    kind: str, rows: Iterable[Row], commit: Commit, key_of: Callable[[str], str | None], folder: Path
) -> ExportCount:
    """Writes the files of a format into a local folder. Error rows are left out and counted.

    kind: one of FORMATS. rows: from read_rows. key_of: returns the key of an image's address below the dataset; None
    for an address elsewhere. Raises ExportError where a package for the format is missing.
    """
    count = ExportCount()

    def good() -> Iterator[Row]:
        for row in rows:
            if row["status"] != "ok":
                count.errors += 1
                continue
            count.images += 1
            count.regions += len(row["regions"])
            yield row

    _WRITERS[kind](good(), commit, key_of, folder)
    return count


def _write_coco(rows: Iterable[Row], commit: Commit, key_of: Callable[[str], str | None], folder: Path) -> None:
    """Writes images.json (for pycocotools' COCO) and results.json (for its loadRes), with one result (RLE) per region.

    The union of an image's results is its mask. The category is class and defect, the score the region's peak.
    """
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ExportError(f"--to coco needs pycocotools ({error}); pip install 'alfa-pipeline[export]'") from None
    categories: dict[tuple[str, str], int] = {}
    description = f"{commit.run_id}, scored by alfa"
    with (folder / "images.json").open("w") as images, _json_list(folder / "results.json") as add_result:
        images.write(f'{{"info": {json.dumps({"description": description})}, "licenses": [], "images": [')
        for number, row in enumerate(rows, start=1):
            image = {
                "id": number,
                "file_name": key_of(row["image_uri"]) or row["image_uri"],
                "coco_url": row["image_uri"],
                "width": row["width"],
                "height": row["height"],
                "alfa_image_id": row["image_id"],
                "alfa_score": row["score"],
            }
            images.write(("\n" if number == 1 else ",\n") + json.dumps(image, ensure_ascii=False))
            for region, mask in split_regions(row["mask"], row["regions"]):
                name = (row["class_name"], region["defect"] or ANOMALY)
                code = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
                add_result(
                    {
                        "image_id": number,
                        "category_id": categories.setdefault(name, len(categories) + 1),
                        "segmentation": {"size": code["size"], "counts": code["counts"].decode("ascii")},
                        "bbox": [region[key] for key in ("x", "y", "width", "height")],
                        "score": region["peak"],
                    }
                )
        listed = [
            {"id": number, "name": f"{class_name}: {defect}", "supercategory": class_name}
            for (class_name, defect), number in categories.items()
        ]
        images.write(f'\n], "annotations": [], "categories": {json.dumps(listed, ensure_ascii=False)}}}\n')


def _write_fiftyone(rows: Iterable[Row], commit: Commit, key_of: Callable[[str], str | None], folder: Path) -> None:
    """Writes a FiftyOneDataset: samples.json, and metadata.json without `version`, so that fields are inferred.

    Photos and masks stay where they are. Boxes are x, y, width, height relative to the image, 0 to 1.
    """
    info = {"run_id": commit.run_id, "run_date": str(commit.run_date)}
    (folder / "metadata.json").write_text(json.dumps({"media_type": "image", "info": info}, indent=2))
    with _json_list(folder / "samples.json", '{"samples": ', "}") as add_sample:
        for row in rows:
            width, height = row["width"], row["height"]
            detections = [
                {
                    "_cls": "Detection",
                    "label": region["defect"] or ANOMALY,
                    "bounding_box": [
                        region["x"] / width,
                        region["y"] / height,
                        region["width"] / width,
                        region["height"] / height,
                    ],
                    "confidence": region["peak"],
                }
                for region in row["regions"]
            ]
            verdict = "anomalous" if row["is_anomalous"] else "normal"
            add_sample(
                {
                    "filepath": row["image_uri"],
                    "_media_type": "image",
                    "tags": [row["class_name"]],
                    "class_name": row["class_name"],
                    "image_id": row["image_id"],
                    "score": row["score"],
                    "verdict": {"_cls": "Classification", "label": verdict, "confidence": row["score"]},
                    "regions": {"_cls": "Detections", "detections": detections},
                    "mask": {"_cls": "Segmentation", "mask_path": row["mask_uri"]},
                }
            )


def _write_label_studio(rows: Iterable[Row], commit: Commit, key_of: Callable[[str], str | None], folder: Path) -> None:
    """Writes tasks.json, with one prediction per photo (rectangles in percent of the image), and label_config.xml.

    Local photos get the address at which Label Studio serves local files with document root /.
    """
    labels: dict[str, None] = {}
    with _json_list(folder / "tasks.json") as add_task:
        for row in rows:
            results = [_rectangle(number, region, row) for number, region in enumerate(row["regions"], start=1)]
            labels.update(dict.fromkeys(result["value"]["rectanglelabels"][0] for result in results))
            uri = row["image_uri"]
            image = f"/data/local-files/?d={quote(uri.lstrip('/'))}" if uri.startswith("/") else uri
            add_task(
                {
                    "data": {"image": image, "class_name": row["class_name"], "image_id": row["image_id"]},
                    "predictions": [
                        {
                            "model_version": f"{row['model']} {commit.run_id}",
                            "score": row["score"],
                            "result": results,
                        }
                    ],
                }
            )
    listed = "\n".join(f"    <Label value={quoteattr(label)}/>" for label in labels or {ANOMALY: None})
    (folder / "label_config.xml").write_text(
        f'<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <RectangleLabels name="label" toName="image">\n{listed}\n  </RectangleLabels>\n</View>\n',
        encoding="utf-8",
    )


def _rectangle(number: int, region: Mapping[str, Any], row: Row) -> dict[str, Any]:
    width, height = row["width"], row["height"]
    return {
        "id": f"{row['image_id'][:8]}-{number}",
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "score": region["peak"],
        "value": {
            "x": 100 * region["x"] / width,
            "y": 100 * region["y"] / height,
            "width": 100 * region["width"] / width,
            "height": 100 * region["height"] / height,
            "rotation": 0,
            "rectanglelabels": [region["defect"] or ANOMALY],
        },
    }


@contextmanager
def _json_list(path: Path, before: str = "", after: str = "") -> Iterator[Callable[[Any], None]]:
    """Writes a JSON list to a file, one item per line, as the items come. Yields the function that adds an item."""
    with path.open("w", encoding="utf-8") as file:
        separator = "\n"

        def add(item: Any) -> None:
            nonlocal separator
            file.write(separator + json.dumps(item, ensure_ascii=False))
            separator = ",\n"

        file.write(f"{before}[")
        yield add
        file.write(f"\n]{after}\n")


_Writer = Callable[[Iterable[Row], Commit, Callable[[str], "str | None"], Path], None]

_WRITERS: Mapping[str, _Writer] = {"coco": _write_coco, "fiftyone": _write_fiftyone, "labelstudio": _write_label_studio}

FORMATS = tuple(_WRITERS)
