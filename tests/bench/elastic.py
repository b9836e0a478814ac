"""Draws how a night uses a cluster that grows and loses nodes: nodes, actors and finished shards over time.

    python -m tests.bench.elastic from-zero infra/from-zero.png
    python -m tests.bench.elastic spot-loss infra/spot-loss.png

The cluster is a Ray head without cores and Ray's autoscaler, which may add four nodes with a GPU each. Nodes are
processes on this machine, their GPUs do not exist, and a shard takes a quarter of a second in which nothing is
computed; the autoscaler, the pool and its actors are real. In spot-loss, three of the four nodes are killed after a
third of the shards. An idle node is removed after six seconds; on real clusters it takes minutes.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import ray
from matplotlib.figure import Figure

from pipeline.engine import ScoringActor, ScoringPool
from pipeline.scoring import Shard, ShardStats
from pipeline.storage import Run
from tests.autoscaling import kill_node, run_autoscaler, worker_nodes
from tests.pools import empty_shard, make_pool

NODES = 4
SHARD_S = 0.25
EVERY_S = 0.25


class IdleActor(ScoringActor):
    """Has no model, and computes nothing."""

    def load(self) -> None:
        pass

    def score(self, shard: Shard, run: Run, *_: Any, **__: Any) -> ShardStats:
        with self._turn:
            time.sleep(SHARD_S)
        return ShardStats(shard.shard_id, 0)


@dataclass
class Timeline:
    """Samples: seconds since the start of the night, nodes besides the head, actors with a node, finished shards."""

    seconds: list[float] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    actors: list[int] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)
    marks: dict[str, float] = field(default_factory=dict)
    done: int = 0

    def watch(self, pool: ScoringPool, ended: threading.Event) -> None:
        """Takes samples until the night has ended and no node is left."""
        started = time.monotonic()
        while not ended.is_set() or worker_nodes():
            self.seconds.append(time.monotonic() - started)
            self.nodes.append(len(worker_nodes()))
            self.actors.append(pool.alive)
            self.shards.append(self.done)
            time.sleep(EVERY_S)

    def draw(self, path: Path, title: str) -> None:
        """Writes the picture: nodes and actors above, shards below."""
        matplotlib.rcParams["font.size"] = 9
        figure = Figure(figsize=(8, 4), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        above.step(self.seconds, self.nodes, where="post", label="nodes", color="tab:blue")
        above.step(self.seconds, self.actors, where="post", label="actors", color="tab:orange", linestyle="--")
        above.set(title=title, ylabel="alive", yticks=range(NODES + 1))
        below.plot(self.seconds, self.shards, color="tab:green")
        below.set(ylabel="finished shards", xlabel="seconds", ylim=(0, None), xlim=(0, None))
        for name, second in self.marks.items():
            for axes in (above, below):
                axes.axvline(second, color="0.6", linewidth=1)
            below.annotate(name, (second, 0), xytext=(3, 4), textcoords="offset points", color="0.4")
        above.legend(loc=(0.6, 0.3))
        figure.savefig(path, dpi=110)


def score_shards(pool: ScoringPool, shards: int, timeline: Timeline, lose: bool) -> None:
    """Scores all shards. lose: whether three nodes are killed after a third of them."""
    started = time.monotonic()
    for _ in pool.score(empty_shard(f"{number:05}") for number in range(shards)):
        timeline.done += 1
        if lose and timeline.done == shards // 3:
            timeline.marks[f"{NODES - 1} nodes killed"] = time.monotonic() - started
            for node in worker_nodes()[: NODES - 1]:
                kill_node(node)
    timeline.marks["last shard"] = time.monotonic() - started
    pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=["from-zero", "spot-loss"])
    parser.add_argument("picture", type=Path)
    parser.add_argument("--shards", type=int, default=400)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    lose = options.scenario == "spot-loss"
    with run_autoscaler(NODES, {"CPU": 1, "GPU": 1}) as address, tempfile.TemporaryDirectory() as folder:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        pool = make_pool(address, Path(folder), options.shards, IdleActor)
        timeline, ended = Timeline(), threading.Event()
        watcher = threading.Thread(target=timeline.watch, args=(pool, ended))
        watcher.start()
        score_shards(pool, options.shards, timeline, lose)
        ended.set()
        watcher.join()
        ray.shutdown()
    assert timeline.done == options.shards
    loss = "three of four spot nodes are lost" if lose else "a night starts from zero"
    timeline.draw(options.picture, f"{options.shards} shards of {SHARD_S} s on up to {NODES} nodes: {loss}")
    marks = ", ".join(f"{name} {second:.0f} s" for name, second in timeline.marks.items())
    print(f"{timeline.done} shards; {marks}; no node left after {timeline.seconds[-1]:.0f} s; {options.picture}")


if __name__ == "__main__":
    main()
