"""The scoring pool's loop on real Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.engine import ScoringActor, ScoringPool
from pipeline.scoring import Shard, ShardStats
from pipeline.storage import Run
from schemas.job import parse_job
from tests.shared_ray import share_ray


class MeetingActor(ScoringActor):
    """Has no model. One actor loads at once, the other when a shard has begun; the two shards meet."""

    def load(self) -> None:
        folder = Path(self._job.output.uri)
        try:
            (folder / "early").touch(exist_ok=False)
        except FileExistsError:
            meet(folder / "begun", os.O_RDONLY)

    def score(self, shard: Shard, run: Run, *_: Any, **__: Any) -> ShardStats:
        folder = Path(run.job.output.uri)
        with self._turn:
            if shard.shard_id == "first":
                meet(folder / "begun", os.O_WRONLY)
            meet(folder / "met", os.O_WRONLY if shard.shard_id == "first" else os.O_RDONLY)
        return ShardStats(shard.shard_id, 0)


def meet(pipe: Path, side: int) -> None:
    """Waits until another process opens the other side."""
    os.close(os.open(pipe, side))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_last_shard_waits_for_an_actor_that_starts_not_behind_a_busy_one(tmp_path: Path) -> None:
    share_ray()
    for name in ("begun", "met"):
        os.mkfifo(tmp_path / name)
    job = parse_job({"dataset": {"images": "x"}, "output": {"uri": str(tmp_path)}, "engine": {"actors": 2}})
    pool = ScoringPool(Run("run", job, "none", ""), "", str(tmp_path), 2, MeetingActor)
    images = pa.table({"class_name": pa.array([], pa.string())})
    try:
        found = list(pool.score(Shard(name, images) for name in ("first", "last")))
    finally:
        pool.close()
    assert sorted(stats.shard_id for stats in found) == ["first", "last"]
