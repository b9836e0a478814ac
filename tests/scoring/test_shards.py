from pathlib import Path

import pyarrow as pa

from pipeline.scoring import identify_shards, write_manifest
from schemas.tables import MANIFEST
from tests.scoring.runs import cut_batches


def batch(first: int, count: int) -> pa.RecordBatch:
    rows = [
        {"uri": f"/in/{n}.png", "key": f"{n}.png", "class_name": "ab"[n % 2], "image_id": f"{n:032x}"}
        for n in range(first, first + count)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=MANIFEST)


def cut(sizes: list[int], size: int) -> list[tuple[str, list[str]]]:
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    shards = cut_batches((batch(first, count) for first, count in zip(firsts, sizes, strict=True)), size)
    return [(shard.shard_id, shard.images.column("key").to_pylist()) for shard in shards]


def test_shards_hold_every_image_once_in_order() -> None:
    shards = cut([3, 10, 1, 0, 7], 4)
    assert [len(keys) for _, keys in shards] == [4, 4, 4, 4, 1, 1, 1, 1, 1]
    assert [key for _, keys in shards for key in keys] == [f"{n}.png" for n in range(21)]


def test_the_last_fourth_of_the_shards_is_small_up_to_a_limit() -> None:
    def sizes(images: int, size: int) -> list[int]:
        return [len(keys) for _, keys in cut([images], size)]

    assert sizes(20, 8) == [8, 8, 4]
    assert sizes(32, 8) == [8, 8, 8, 2, 2, 2, 2]
    assert sizes(70, 8) == [8] * 6 + [2] * 11
    assert sizes(7, 1) == [1] * 7
    assert sizes(7, 3) == [3, 3, 1]
    assert sizes(1600, 4) == [4] * 336 + [1] * 256


def test_shards_depend_on_images_not_on_how_they_were_listed() -> None:
    assert cut([21], 4) == cut([1, 5, 15], 4)


def test_shards_are_identified_as_they_are_cut(tmp_path: Path) -> None:
    """Also by the very ids that finished nights are stored under."""
    batches = [batch(0, 10), batch(10, 0), batch(10, 11)]
    sizes = identify_shards(write_manifest(batches, tmp_path), 8)
    assert sizes == {shard.shard_id: shard.images.num_rows for shard in cut_batches(batches, 8)}
    assert sizes == {"4822610ec8fbd510": 8, "8c91dbf1a7121902": 8, "1eb65abb10927e83": 5}


def test_appended_images_leave_full_shards_as_they_are() -> None:
    before, after = cut([10], 4), cut([14], 4)
    assert after[:2] == before[:2] and after[2] != before[2]


def test_a_shard_does_not_drag_its_batch_along() -> None:
    shard = cut_batches([batch(0, 5000)], 4)[0]
    assert shard.images.get_total_buffer_size() < 2000


def test_manifest_counts_classes_and_keeps_rows(tmp_path: Path) -> None:
    manifest = write_manifest([batch(0, 3), batch(3, 2)], tmp_path)
    assert (manifest.images, manifest.classes) == (5, {"a": 3, "b": 2})
    assert pa.Table.from_batches(manifest.batches()).to_pylist() == batch(0, 5).to_pylist()


def test_manifest_digest_follows_content_and_order(tmp_path: Path) -> None:
    digests = [
        write_manifest(batches, tmp_path).digest
        for batches in ([batch(0, 5)], [batch(0, 3), batch(3, 2)], [batch(3, 2), batch(0, 3)], [batch(0, 4)])
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
