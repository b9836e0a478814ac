"""Lists images for tests, and returns the error where they cannot be listed."""

from __future__ import annotations

import pytest

from pipeline.images import DatasetError, list_images, open_dataset
from schemas.job import Dataset, Storage
from schemas.tables import MANIFEST


def rows_of(images: str, **options: object) -> tuple[str, list[dict[str, object]]]:
    source = open_dataset(Dataset.model_validate({"images": images, **options}), Storage())
    batches = list(list_images(source))
    assert all(batch.schema.equals(MANIFEST) for batch in batches)
    return source.layout, [row for batch in batches for row in batch.to_pylist()]


def listed(images: str, **options: object) -> tuple[str, list[tuple[object, object]]]:
    layout, rows = rows_of(images, **options)
    return layout, [(row["key"], row["class_name"]) for row in rows]


def fault_of(images: str, **options: object) -> str:
    with pytest.raises(DatasetError) as caught:
        list(list_images(open_dataset(Dataset.model_validate({"images": images, **options}), Storage())))
    return str(caught.value)
