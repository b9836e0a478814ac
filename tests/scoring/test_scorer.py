import io
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw

from pipeline.alfa import Detection, Detector, Pending, PromptEmbeddings, load_encoder, locate_weights
from pipeline.images import list_images, open_dataset
from pipeline.lake import publish_night, read_commit
from pipeline.scoring import Shard, ShardStats, Thresholds, mask_shard, quantile_thresholds, score_shard
from pipeline.storage import Run, Store, paths, read_shard
from schemas.job import JobConfig
from schemas.tables import SCORES
from tests.places import DEMO
from tests.scoring.runs import cut_batches, embed, job_for, load_detector, score, shards_of


@pytest.fixture(scope="module")
def detector() -> Detector:
    job = job_for(DEMO, DEMO)
    return load_detector(job)


def read_mask(row: dict[str, object]) -> np.ndarray:
    return np.asarray(Image.open(str(row["mask_uri"])))


def test_good_and_bad_hazelnuts_separate(detector: Detector, tmp_path: Path) -> None:
    rows = score(detector, job_for(DEMO, tmp_path, "dataset.class_name=hazelnut"), "hazelnut")
    good = [row["score"] for row in rows if "/good/" in str(row["image_key"])]
    bad = [row["score"] for row in rows if "/colour/" in str(row["image_key"])]
    wins = [a > b for a in bad for b in good]
    assert (len(good), len(bad)) == (6, 6) and sum(wins) / len(wins) > 0.7


def test_every_image_has_a_row_and_every_good_one_a_mask_of_its_size(detector: Detector, tmp_path: Path) -> None:
    images = tmp_path / "in" / "nut"
    images.mkdir(parents=True)
    photo = (DEMO / "hazelnut/test/colour/01.jpg").read_bytes()
    for name in ("a.jpg", "b #1 ü.jpg", "c.png"):
        (images / name).write_bytes(photo)
    (images / "empty.jpg").touch()
    (images / "cut.jpg").write_bytes(photo[:3000])
    (images / "text.png").write_text("no image")
    Image.new("RGB", (3000, 2000)).save(images / "large.png")
    (images / "gone.jpg").write_bytes(photo)
    job = job_for(tmp_path / "in", tmp_path / "out", "engine.shard_size=3", "dataset.max_pixels=1000000")
    batches = list(list_images(open_dataset(job.dataset, job.storage)))
    (images / "gone.jpg").unlink()
    run, output = Run("run", job, "alfa-small", "0" * 64), Store(job.output.uri)
    prompts, rows = embed(detector, job, "nut"), []
    for shard in cut_batches(batches, 3):
        score_shard(shard, run, detector, prompts, Store(job.dataset.images), output, threads=2)
        rows += read_shard(output, run.shards, shard.shard_id).to_pylist()
    outcome = {Path(row["image_key"]).name: row["error_type"] for row in rows}
    assert outcome == {
        "a.jpg": None,
        "b #1 ü.jpg": None,
        "c.png": None,
        "cut.jpg": "truncated",
        "empty.jpg": "empty",
        "gone.jpg": "vanished",
        "large.png": "too_many_pixels",
        "text.png": "not_an_image",
    }
    for row in rows:
        if row["status"] == "ok":
            mask = read_mask(row)
            assert mask.shape == (row["height"], row["width"]) and set(np.unique(mask)) <= {0, 255}
        else:
            assert row["error_message"] and row["score"] is None and row["mask_uri"] is None
    assert len({row["mask_uri"] for row in rows if row["status"] == "ok"}) == 3


class WatchedStore(Store):
    """Tells when it has been read so many times."""

    def __init__(self, root: str, wanted: int) -> None:
        super().__init__(root)
        self._waiting = threading.Semaphore(0)
        self._wanted = wanted

    def read_uri(self, uri: str) -> bytes:
        data = super().read_uri(uri)
        self._waiting.release()
        return data

    def was_read(self) -> bool:
        return all(self._waiting.acquire(timeout=30) for _ in range(self._wanted))


def test_a_shard_reads_ahead_while_another_has_the_model(detector: Detector, tmp_path: Path) -> None:
    job = job_for(DEMO, tmp_path, "dataset.class_name=hazelnut", "model.batch_size=2")
    run, output, turn = Run("run", job, "alfa-small", "0" * 64), Store(job.output.uri), threading.Lock()
    prompts, source = embed(detector, job, "hazelnut"), WatchedStore(job.dataset.images, wanted=4)
    (shard,) = shards_of(job)
    with ThreadPoolExecutor(1) as pool:
        with turn:
            scored = pool.submit(score_shard, shard, run, detector, prompts, source, output, 2, turn=turn)
            assert source.was_read()
            assert not list(output.list("masks")) and not scored.done()
        assert scored.result().images == 12
    assert len(list(output.list("masks"))) == 12 and not turn.locked()


class AsynchronousDetector(Detector):
    """Its device is done with a batch only when it has been given the one after it."""

    def __init__(self, detector: Detector, job: JobConfig, batches: int) -> None:
        super().__init__(detector.encoder, job.resolved_method)
        self._last = batches - 1
        self._given = [threading.Event() for _ in range(batches)]
        self._numbers = itertools.count()

    def start(self, pixels: torch.Tensor, prompts: Sequence[PromptEmbeddings]) -> Pending:
        number, pending = next(self._numbers), super().start(pixels, prompts)
        self._given[number].set()

        def wait() -> list[Detection]:
            assert self._given[min(number + 1, self._last)].wait(timeout=30)
            return pending()

        return wait


def test_the_device_has_the_next_batch_before_it_is_done_with_one(detector: Detector, tmp_path: Path) -> None:
    """Also where that is the first of another shard, which then has the model."""
    job = job_for(DEMO, tmp_path, "dataset.class_name=hazelnut", "model.batch_size=2", "engine.shard_size=6")
    run, output, turn = Run("run", job, "alfa-small", "0" * 64), Store(job.output.uri), threading.Lock()
    prompts, asynchronous = embed(detector, job, "hazelnut"), AsynchronousDetector(detector, job, 6)

    def score(shard: Shard) -> ShardStats:
        return score_shard(shard, run, asynchronous, prompts, Store(str(DEMO)), output, 2, turn=turn)

    with ThreadPoolExecutor(2) as pool:
        scored = list(pool.map(score, shards_of(job)))
    assert [(stats.images, stats.errors) for stats in scored] == [(6, {}), (6, {})] and not turn.locked()


def test_a_shard_that_fails_leaves_the_model_to_others(detector: Detector, tmp_path: Path) -> None:
    job = job_for(DEMO, tmp_path, "dataset.class_name=hazelnut", "model.batch_size=2")
    (tmp_path / "masks").touch()
    run, turn = Run("run", job, "alfa-small", "0" * 64), threading.Lock()
    prompts, (shard,) = embed(detector, job, "hazelnut"), shards_of(job)
    with pytest.raises(OSError, match="masks") as failure:
        score_shard(shard, run, detector, prompts, Store(str(DEMO)), Store(job.output.uri), 2, turn=turn)
    assert not turn.locked(), failure


def test_a_large_jpeg_decoded_small_has_the_score_of_all_its_pixels(detector: Detector, tmp_path: Path) -> None:
    """Demo photos at 12 megapixels as JPEG, and the very same pixels in a file that is always decoded in full."""
    images = tmp_path / "in" / "hazelnut"
    images.mkdir(parents=True)
    for number, path in enumerate(sorted((DEMO / "hazelnut/test").rglob("*.jpg"))[::3]):
        Image.open(path).resize((4000, 3000)).save(images / f"{number}.jpg", quality=90)
        Image.open(images / f"{number}.jpg").save(images / f"{number}.bmp")
    rows = score(detector, job_for(tmp_path / "in", tmp_path / "out"), "hazelnut")
    scores = {Path(str(row["image_key"])).name: row["score"] for row in rows}
    assert len(scores) == 8 and {(row["width"], row["height"]) for row in rows} == {(4000, 3000)}
    for number in range(4):
        assert scores[f"{number}.jpg"] == pytest.approx(scores[f"{number}.bmp"], abs=0.02)


def test_an_off_centre_defect_is_marked_at_its_place_in_an_oblong_photo(detector: Detector, tmp_path: Path) -> None:
    """Where a blot raises the map most is where it was painted, at the size of the photo."""
    images = tmp_path / "in" / "hazelnut"
    images.mkdir(parents=True)
    photo = Image.open(DEMO / "hazelnut/test/good/00.jpg").resize((1500, 1000))
    photo.save(images / "a.png")
    ImageDraw.Draw(photo).ellipse((880, 270, 1080, 470), fill=(225, 60, 140))
    photo.save(images / "b.png")
    rows = score(detector, job_for(tmp_path / "in", tmp_path / "out", "output.maps=true"), "hazelnut")
    assert [(row["width"], row["height"]) for row in rows] == [(1500, 1000)] * 2
    clean, blotted = (np.asarray(Image.open(str(row["map_uri"]))).astype(int) for row in rows)
    assert clean.shape == blotted.shape == read_mask(rows[1]).shape == (1000, 1500)
    y, x = np.unravel_index(np.argmax(blotted - clean), clean.shape)
    assert 880 <= x <= 1080 and 270 <= y <= 470


def test_a_mixed_batch_scores_as_one_by_one(detector: Detector, tmp_path: Path) -> None:
    classes = ("capsules", "hazelnut")
    mixed = score(detector, job_for(DEMO, tmp_path / "a", "model.batch_size=24"), *classes)
    single = score(detector, job_for(DEMO, tmp_path / "b", "model.batch_size=1", "engine.shard_size=5"), *classes)
    for one, other in zip(mixed, single, strict=True):
        assert one["image_id"] == other["image_id"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_quantiles_are_per_class_and_skip_errors() -> None:
    table = pa.table(
        {
            "class_name": ["a"] * 5 + ["b"] * 2,
            "score": [0.1, 0.2, 0.3, 0.4, None, 0.8, 0.6],
            "map_peak": [0.5, 0.6, 0.7, 0.8, None, 0.2, 0.4],
        }
    )
    cuts = quantile_thresholds([table.slice(0, 3), table.slice(3)], 0.5)
    assert cuts == {
        "a": Thresholds(pytest.approx(0.25), pytest.approx(0.65)),
        "b": Thresholds(pytest.approx(0.7), pytest.approx(0.3)),
    }


def test_the_second_pass_masks_as_the_first_would(detector: Detector, tmp_path: Path) -> None:
    classes = ("capsules", "hazelnut")
    fixed = score(detector, job_for(DEMO, tmp_path / "a", "threshold.value=0.6", "threshold.mask_value=0.4"), *classes)
    job = job_for(DEMO, tmp_path / "b", "threshold.policy=quantile")
    assert all(row["mask_uri"] is None for row in score(detector, job, *classes))
    run, output = Run("run", job, "alfa-small", "0" * 64), Store(job.output.uri)
    cuts = dict.fromkeys(classes, Thresholds(0.6, 0.4))
    again = []
    for shard in shards_of(job):
        mask_shard(shard.shard_id, "cuts", cuts, run, output, threads=2)
        again += read_shard(output, paths.masked_shards("run", "cuts"), shard.shard_id).to_pylist()
    for one, other in zip(fixed, again, strict=True):
        for name in ("is_anomalous", "mask_area", "regions", "threshold", "mask_threshold"):
            assert one[name] == other[name]
        np.testing.assert_array_equal(read_mask(one), read_mask(other))


def test_a_published_night_holds_every_row_once_and_replaces_the_last(detector: Detector, tmp_path: Path) -> None:
    job = job_for(DEMO, tmp_path, "engine.shard_size=5")
    rows, output, run = (
        score(detector, job, "capsules", "hazelnut"),
        Store(job.output.uri),
        Run("run", job, "m", "0" * 64),
    )
    stale = paths.table_key(job.run_date, "a class of another run")
    output.write(stale, b"old")
    shard_ids = [shard.shard_id for shard in shards_of(job)]
    for _ in range(2):
        commit = publish_night(run, "digest", run.shards, shard_ids, output, "test")
        assert read_commit(output, job.run_date) == commit and commit.rows == 24
        files = [info.key for info in output.list("scores")]
        assert files == [entry.table_key for entry in commit.files]
        published = pa.concat_tables(pq.read_table(io.BytesIO(output.read(key)), partitioning=None) for key in files)
        assert published.schema.equals(SCORES)
        assert sorted(published.column("image_id").to_pylist()) == sorted(str(row["image_id"]) for row in rows)
        for entry in commit.files:
            assert output.read(entry.key) == output.read(entry.table_key)


def test_every_published_field_is_documented() -> None:
    assert all(field.metadata[b"doc"] for field in SCORES)


def test_scores_that_are_not_numbers_become_error_rows(tmp_path: Path) -> None:
    job = job_for(DEMO, tmp_path, "dataset.class_name=hazelnut")
    encoder = load_encoder(job.model, locate_weights(job.model))
    with torch.no_grad():
        encoder._visual.proj.fill_(torch.nan)
    rows = score(Detector(encoder, job.resolved_method), job, "hazelnut")
    assert {row["error_type"] for row in rows} == {"internal"} and len(rows) == 12
