"""Tests the documents of an evaluation: names from outside are only text, and pictures are valid."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.evaluation import HEADERS, LabelledImage, Picture, Score, to_html, to_markdown
from pipeline.evaluation.document import Heading, Sheet, Text
from pipeline.evaluation.measure import Configuration
from pipeline.evaluation.pictures import draw_curves, draw_distributions, draw_failure, tile_size

EVIL = "a|b <img src=x onerror=alert(1)> [x](javascript:y) `c` $m$\n# title"


def test_names_from_outside_are_text() -> None:
    blocks = [
        Heading(EVIL),
        Text(EVIL),
        Sheet(("class", *HEADERS), [[EVIL, *["1.0"] * 7]]),
        Picture("a.png", b"p", EVIL),
    ]
    page, text = to_html(blocks).decode(), to_markdown(blocks).decode()
    for shown in (page, text):
        assert "<img src=x" not in shown and "&lt;img" in shown
    assert "[x](" not in text.replace("\\[", "").replace("\\]", "") and "\n# title" not in text
    row = next(line for line in text.splitlines() if line.startswith("| a"))
    assert row.replace("\\|", "").count("|") == 9  # eight cells
    assert "data:image/png;base64,cA==" in page and "http" not in page


def test_numbers_are_aligned_to_the_right() -> None:
    text = to_markdown([Sheet(("class", "good", "PRO", "note"), [["nut", "3", "1.0", "ok"]])]).decode()
    assert text.splitlines()[1] == "| :-- | --: | --: | :-- |"


def test_curves_and_distributions_draw_every_kind_of_class() -> None:
    labels = [("nut", "good"), ("nut", "crack"), ("tile", "good"), ("a $x_{", "bent")]
    images = [LabelledImage("u", "k", name, label, None) for name, label in labels]
    scores = [Score(value, 0, 0, np.zeros((2, 2), np.float32)) for value in (0.1, 0.9, 0.5)]
    configuration = Configuration("base", [*scores, None])
    curve = np.array([0.0, 0.1, 1.0]), np.array([0.0, 0.8, 1.0])
    for data in (
        draw_curves(images, configuration, {"nut": curve}, {"nut": curve}),
        draw_distributions(images, configuration),
    ):
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            assert picture.format == "PNG" and min(picture.size) > 200
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_a_failure_shows_photo_map_and_truth_at_their_places() -> None:
    height, width = tile_size(600, 300)
    assert (height, width) == (160, 320)
    photo = np.full((height, width, 3), (10, 200, 30), dtype=np.uint8)
    anomaly_map = np.zeros((height, width), dtype=np.float32)
    anomaly_map[40:60, 100:140] = 0.8
    truth = anomaly_map > 0.5
    picture = np.asarray(Image.open(io.BytesIO(draw_failure(photo, anomaly_map, truth, (0.0, 0.8)))))
    assert picture.shape == (height, 3 * width + 12, 3)
    assert picture[80, 20].tolist() == [10, 200, 30]
    hot, cold = picture[50, width + 6 + 120].astype(int), picture[100, width + 6 + 20].astype(int)
    assert hot.sum() > 500 > 100 > cold.sum()
    assert picture[50, 2 * (width + 6) + 120].tolist() == [255] * 3 and picture[100, 2 * (width + 6) + 20].max() == 0
    unknown = np.asarray(Image.open(io.BytesIO(draw_failure(photo, anomaly_map, None, (0.0, 0.8)))))
    assert unknown[50, 2 * (width + 6) + 120].tolist() == [128] * 3
