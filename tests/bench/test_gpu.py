"""Tests the bench of a GPU on the CPU, with a tiny model and a few photos."""

from __future__ import annotations

import json
import math
from pathlib import Path

import open_clip
import pytest

from tests.bench.gpu import ROWS, Bench, Options, Outcome, Row, Skipped, measure_rows

TINY = Options("bench-tiny", batch=2, images=4, seconds=0.01, device="cpu")
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
COMPILED = "torch.compile: rate over eager"


@pytest.fixture(scope="module", autouse=True)
def model(tmp_path_factory: pytest.TempPathFactory) -> None:
    """open_clip knows the tiny model by its name."""
    config: Path = tmp_path_factory.mktemp("models") / "bench-tiny.json"
    config.write_text(json.dumps(MODEL))
    open_clip.add_model_config(config)


def test_every_row_has_a_figure_or_needs_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row for row in ROWS if row.name != COMPILED]
    outcomes = measure_rows(rows, TINY)
    printed = capsys.readouterr().out
    assert all(row.name in printed for row in rows)
    skipped = {name for name, outcome in outcomes.items() if outcome.note == "skipped: needs CUDA"}
    assert {name.split(":")[0] for name in skipped} == {"actor", "nvJPEG", "CUDA graph"}
    figures = [outcome.figure for name, outcome in outcomes.items() if name not in skipped]
    assert len(figures) == 3
    assert all(figure is not None and math.isfinite(figure) and figure > 0 for figure in figures)


@pytest.mark.slow
def test_compiled_blocks_are_measured() -> None:
    outcome = measure_rows([row for row in ROWS if row.name == COMPILED], TINY)[COMPILED]
    assert outcome.figure is not None and outcome.figure > 0


def test_a_row_that_fails_says_so_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: Bench) -> Outcome:
        raise RuntimeError("no kernel image")

    def skip(_: Bench) -> Outcome:
        raise Skipped("needs CUDA")

    rows = [Row("a", "", fail), Row("b", "", skip), Row("c", "", lambda _: Outcome(1.0, "fine"))]
    outcomes = measure_rows(rows, TINY)
    assert [(outcome.figure, outcome.failed) for outcome in outcomes.values()] == [
        (None, True),
        (None, False),
        (1.0, False),
    ]
    assert "RuntimeError: no kernel image" in capsys.readouterr().out
