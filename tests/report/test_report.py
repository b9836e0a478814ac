"""Tests the content of a report's page, that texts cannot break out of it, and its size."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from jobs.report import report_night, run_report
from pipeline.report import ReportError, load_report, render, write_report
from pipeline.report.loading import MOST_EXHIBITS, MOST_FAILURES, MOST_IMAGES, fair_shares, shrink_map
from pipeline.storage import Store
from schemas.records import Commit
from tests.nights import NIGHT
from tests.report.nights import failed, prompt_set, publish, save_photo, scored
from tests.report.page import HOSTILE, Page


def read(folder: Path, commit: Commit) -> Page:
    return Page(render(load_report(Store(str(folder)), commit)))


@pytest.fixture
def night(tmp_path: Path) -> tuple[Path, Commit]:
    """Two classes: three bolts, of which one is anomalous and one an error, and one nut; photos of the bolts alone."""
    photos = tmp_path / "in"
    rows = [
        scored("bolt/a.jpg", "bolt", 0.4, photos),
        scored("bolt/b.jpg", "bolt", 0.9, photos),
        failed("bolt/c.jpg", "bolt", photos, "the file is damaged"),
        scored("nut/a.jpg", "nut", 0.5, photos),
    ]
    for seed, name in enumerate("ab"):
        save_photo(photos / "bolt" / f"{name}.jpg", seed)
    return tmp_path / "out", publish(tmp_path / "out", photos, rows, [prompt_set("bolt"), prompt_set("nut")])


def test_headline_classes_errors_prompts_and_run_are_said(night: tuple[Path, Commit]) -> None:
    page = read(*night)
    for words in (
        f"Night of {NIGHT}",
        "Images42 classes",
        "Anomalous125.0% of images",
        "Errors125.0% of images",
        "Throughput12.5images a second",
        "LLM calls4800 tokens, 0.0250 USD",
        "corrupt 1",
        "bolt/c.jpgboltcorruptthe file is damaged",
        "by maker/model, 2026-01-01 · 2 calls, 400 tokens, 0.0125 USD",
        "ViT-test/weights",
        "local_weight: 0.5",
    ):
        assert words in page.words, words
    assert "Embedded model" not in page.text


def test_the_table_of_classes_counts_and_draws_each_score(night: tuple[Path, Commit]) -> None:
    page = read(*night)
    assert "bolt3133.3%\u201310.6500.9000.600" in page.words.replace(" ", "")
    bars = [attributes for tag, attributes in page.elements if tag == "rect"]
    # 40 bins from 0.4 to 0.9: 0.4 is in the first, 0.9 in the last, 0.5 in the ninth; only 0.9 is over the threshold.
    assert [(bar["x"], bar.get("class")) for bar in bars] == [("0", None), ("195", "hot"), ("40", None)]


def test_an_image_is_shown_with_its_map_regions_and_prompts(night: tuple[Path, Commit]) -> None:
    data = read(*night).data
    order = [
        (data["classes"][number], key)
        for number, key in zip(data["images"]["class"], data["images"]["key"], strict=True)
    ]
    # Rank by rank: the first of each class (the higher score first), then the second; errors last.
    assert order == [("bolt", "bolt/b.jpg"), ("nut", "nut/a.jpg"), ("bolt", "bolt/a.jpg"), ("bolt", "bolt/c.jpg")]
    assert data["images"]["state"] == [1, 0, 0, 2] and data["images"]["exhibit"] == [0, 1, 2, None]
    first, second = data["exhibits"][:2]
    assert first["photo"].startswith("/9j/") and first["regions"] == [[50, 25, 25, 25, 600, 0.9, "defect 1", None]]
    assert second["photo"] is None and second["photo_fault"] == "the photo is no longer there"
    dropped = [prompt for prompt, kept in zip(data["prompts"]["0"], first["kept"], strict=True) if kept == "0"]
    assert [side for _, side, _ in dropped] == [0, 1] and "a photo of a bolt" in dropped[0][0]


def test_deep_photos_are_shown_at_the_depth_of_their_class(tmp_path: Path) -> None:
    """1000 is 249 of 255 in 10 bits, as the photo alone would be shown, and 62 in 12."""
    (tmp_path / "in/nut").mkdir(parents=True)
    Image.fromarray(np.full((40, 40), 1000, np.uint16)).save(tmp_path / "in/nut/a.png")
    rows = [scored("nut/a.png", "nut", 0.9, tmp_path / "in")]
    for overrides, spans, value in (([], {"nut": (0, 4095)}, 62), (["dataset.bit_depth=10"], {}, 249)):
        commit = publish(tmp_path / f"{value}", tmp_path / "in", rows, overrides=overrides, spans=spans)
        (exhibit,) = load_report(Store(str(tmp_path / f"{value}")), commit).exhibits
        assert exhibit.photo is not None
        with Image.open(io.BytesIO(exhibit.photo)) as photo:
            assert photo.convert("L").getpixel((20, 20)) == pytest.approx(value, abs=2)


def test_classes_that_look_alike_stay_apart(tmp_path: Path) -> None:
    photos, names = tmp_path / "in", ("a b", "a  b", "a\u202e b")
    commit = publish(tmp_path / "out", photos, [scored(f"{n}/x", name, 0.5, photos) for n, name in enumerate(names)])
    data = read(tmp_path / "out", commit).data
    assert data["classes"] == ["a b"] * 3 and sorted(data["images"]["class"]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["threshold.value=0.4"], "fixed 0.4"),
        (["threshold.policy=quantile"], "quantile 0.95"),
        (["threshold.policy=reference", "references.images=train"], "reference 0.99"),
        (["threshold.policy=labels", "threshold.table=s3://lake/cut.json"], "labels s3://lake/cut.json"),
    ],
)
def test_the_policy_of_thresholds_is_said(tmp_path: Path, overrides: list[str], said: str) -> None:
    photos = tmp_path / "photos"
    save_photo(photos / "bolt/a.jpg", 0)
    commit = publish(tmp_path, photos, [scored("bolt/a.jpg", "bolt", 0.7, photos)], overrides=overrides)
    assert f"Threshold{said}Scored by" in read(tmp_path, commit).words


def test_the_embedded_model_is_called_one(tmp_path: Path) -> None:
    photos = tmp_path / "in"
    commit = publish(tmp_path / "out", photos, [scored("a", "nut", 0.5, photos)], embedded_model=True)
    page = read(tmp_path / "out", commit)
    assert "Embedded model. ViT-test/weights is the model that comes with alfa." in page.words
    assert "0.95 on cookies" in page.words
    assert "no record of its prompts" in page.words


def test_a_night_of_the_former_demonstration_model_is_still_called_one(tmp_path: Path) -> None:
    photos = tmp_path / "in"
    commit = publish(tmp_path / "out", photos, [scored("a", "nut", 0.5, photos)], demonstration_model=True)
    words = read(tmp_path / "out", commit).words
    assert "Demonstration model. The scores of ViT-test/weights say nothing about real defects." in words


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_outside_stays_text(tmp_path: Path, text: str) -> None:
    photos = tmp_path / "in"
    rows = [
        scored(
            f"x/{text}.jpg",
            text,
            0.9,
            photos,
            explanation=[{"prompt": text, "defect": text, "weight": 1.0, "similarity": 0.5}],
        ),
        failed(f"y/{text}.jpg", text, photos, text),
    ]
    rows[0]["regions"][0]["defect"] = text
    publish(tmp_path / "out", photos, [{**rows[0], "score": 0.1, "is_anomalous": False}], night="2026-01-01")
    described = prompt_set(text, normal=[f"{text} {n}" for n in range(5)])
    commit = publish(
        tmp_path / "out", photos, rows, [described.model_copy(update={"model": text})], versions={text: text}
    )
    html = render(load_report(Store(str(tmp_path / "out")), commit))
    page = Page(html)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and "img" not in tags and html.count("</script") == 2
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all(str(attributes.get("href", "#")).startswith("#") for tag, attributes in page.elements if tag == "a")
    assert page.data["classes"] == [text] and text in page.data["images"]["key"][0]
    assert page.data["exhibits"][0]["explanation"][0][:2] == [text, text]
    assert text in page.text and "<!--" not in html and "49" not in page.data["classes"][0]


def test_the_page_runs_its_own_script_alone_and_loads_nothing(night: tuple[Path, Commit]) -> None:
    page = read(*night)
    policy = next(str(a["content"]) for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "unsafe" not in policy
    assert not any(name in ("src", "style") for _, attributes in page.elements for name in attributes)
    assert not any(tag in ("link", "iframe", "object") for tag, _ in page.elements)


def test_a_night_without_shards_or_record_of_prompts_still_has_a_page(night: tuple[Path, Commit]) -> None:
    folder, commit = night
    run = folder / "runs" / commit.run_id
    shutil.rmtree(run / "shards")
    (run / "prompts.json").unlink()
    (run / "stats.json").unlink()
    page = read(folder, commit)
    assert [exhibit["grid"] for exhibit in page.data["exhibits"]] == [None, None, None]
    assert "no record of its prompts" in page.words


def test_the_page_is_bounded_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    photos = tmp_path / "in"
    rows = [scored(f"{n}.jpg", "nut", n / 12_000, photos) for n in range(11_000)]
    rows += [scored(f"rare/{n}.jpg", "rare", 0.1, photos) for n in range(3)]
    rows += [failed(f"bad/{n}.jpg", "nut", photos, "x" * 400) for n in range(600)]
    save_photo(photos / "10999.jpg", 1)
    save_photo(photos / "10998.jpg", 2)
    report = load_report(Store(str(tmp_path / "out")), publish(tmp_path / "out", photos, rows))
    assert (len(report.images), len(report.failures), len(report.exhibits)) == (
        MOST_IMAGES,
        MOST_FAILURES,
        MOST_EXHIBITS,
    )
    assert sum(image.class_name == "rare" for image in report.images) == 3
    page = Page(render(report))
    assert "the most anomalous 200 of 11,003 scored images" in page.words and "500 of 600 are listed" in page.words
    assert [bool(exhibit["photo"]) for exhibit in page.data["exhibits"][:3]] == [True, False, True]
    size = len(render(report, largest=0).encode())
    first = len(page.data["exhibits"][0]["photo"])
    bounded = render(report, largest=size + first)
    assert len(bounded.encode()) <= size + first
    shown = Page(bounded).data["exhibits"]
    assert shown[0]["photo"] and shown[2]["photo"] is None and "largest size" in shown[2]["photo_fault"]


@pytest.mark.parametrize(
    ("sizes", "total", "shares"),
    [
        ([5, 5], 20, [5, 5]),
        ([100, 2, 100], 12, [5, 2, 5]),
        ([0, 7, 1], 5, [0, 4, 1]),
        ([9, 9, 9], 2, [0, 1, 1]),
        ([], 4, []),
    ],
)
def test_fair_shares(sizes: list[int], total: int, shares: list[int]) -> None:
    assert fair_shares(sizes, total) == shares


def test_a_finished_night_is_rendered_anew_and_what_is_not_published_is_refused(
    night: tuple[Path, Commit],
) -> None:
    output, commit, console = Store(str(night[0])), night[1], Console(file=io.StringIO())
    place = Path(report_night(output, commit, anew=False) or "")
    assert place == night[0] / "runs" / commit.run_id / "report" / "index.html"
    place.write_text("old")
    assert report_night(output, commit, anew=False) == str(place) and place.read_text() == "old"
    assert run_report(output, commit.run_id, None, console) == 0 and "Night of" in place.read_text()
    with pytest.raises(ReportError, match="was published by run"):
        run_report(output, f"{NIGHT}-{'b' * 12}", None, console)
    with pytest.raises(ReportError, match="is not published"):
        run_report(output, None, "2025-01-01", console)


def test_a_report_that_fails_is_a_warning(night: tuple[Path, Commit], caplog: pytest.LogCaptureFixture) -> None:
    (night[0] / "runs" / night[1].run_id / "job.yaml").unlink()
    output = Store(str(night[0]))
    with pytest.raises(ReportError, match=r"job\.yaml is missing"):
        write_report(output, night[1])
    assert report_night(output, night[1], anew=True) is None
    assert "the night is published, but its report could not be written" in caplog.text


def test_maps_of_tiled_photos_are_coarser_and_keep_their_peaks() -> None:
    grid = np.zeros((130, 100), np.float32)
    grid[129, 50] = 0.9
    small = shrink_map(grid.ravel().tolist(), 100)
    assert small.shape == (44, 34) and small[43, 16] == small.max() == np.float32(0.9) and small.min() == 0
    same = shrink_map([0.25, 0.5, 0.75, 1.0], 2)
    assert same.tolist() == [[0.25, 0.5], [0.75, 1.0]]
