"""Tests the bench of the stages: on hand-made stages, and that each stage of a photo is measured."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from schemas.job import EMBEDDED_MODEL
from tests.bench.decoding import make_jpeg
from tests.bench.lock import LockSampler
from tests.bench.stages import (
    OF_MASKS,
    Figures,
    Stage,
    build_timeless_actor,
    find_deflated,
    make_png,
    measure_photo,
    measure_stages,
    open_local,
    sum_up,
)

STAGES = {"read, local", "decode", "resize", "hand over", "around the model", *OF_MASKS, "rows", "shard file"}


def count() -> None:
    for _ in range(500_000):
        pass


def compress() -> None:
    zlib.compress(bytes(5_000_000), 1)


def test_a_stage_takes_what_its_part_does_not(sampler: LockSampler) -> None:
    def both() -> None:
        count()
        compress()

    stages = [Stage("library", compress, 2), Stage("python", both), Stage("rest", both, part="python")]
    figures = measure_stages(stages, sampler, rounds=3, seconds=0.1)
    assert figures["library"].lock < figures["python"].lock / 2
    assert abs(figures["rest"].core) < figures["python"].core / 2
    assert figures["library"].core < figures["python"].core


def test_sums_leave_out_other_places_and_skipped_stages() -> None:
    figures = {
        "read, a": Figures(1, 1, 1, ""),
        "read, b": Figures(2, 2, 2, ""),
        "PNG": Figures(4, 4, None, ""),
        "write, a": Figures(8, 8, 8, ""),
        "write, b": Figures(16, 16, 16, ""),
    }
    sums = {name: (item.core, item.floor) for name, item in sum_up(figures, ["a", "b"]).items()}
    assert sums == {
        "sum, a, masked": (13, 9),
        "sum, a, empty mask": (9, 9),
        "sum, b, masked": (22, 18),
        "sum, b, empty mask": (18, 18),
    }


def test_the_deflated_bytes_of_a_png_hold_its_lines() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((3, 5, 3), 7, np.uint8)).save(buffer, "PNG")
    assert len(zlib.decompress(find_deflated(buffer.getvalue()))) == 3 * (1 + 5 * 3)


def test_every_stage_of_a_photo_is_measured(sampler: LockSampler, tmp_path: Path) -> None:
    actor = build_timeless_actor(EMBEDDED_MODEL, 2, tmp_path / "actor")
    places = [open_local(tmp_path / "plain")]
    for data in (make_jpeg(64, 48, progressive=False), make_png(32)):
        figures = measure_photo(actor, places, data, sampler, rounds=1, seconds=0.001)
        assert set(figures) - {"sum, local, masked", "sum, local, empty mask"} == {*STAGES, "write, local"}
        assert all(item.core > 0 for name, item in figures.items() if name != "resize")
        assert {name for name, item in figures.items() if item.floor is None} == {"around the model", "regions"}
