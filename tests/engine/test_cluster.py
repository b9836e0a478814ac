"""How many actors, of what size, are started on which nodes."""

import pytest

from pipeline.engine import ActorPlan, EngineError, plan_actors
from schemas.job import JobConfig, parse_job


def job(*overrides: str) -> JobConfig:
    return parse_job({"dataset": {"images": "x"}, "output": {"uri": "y"}}, overrides)


LAPTOP = [{"CPU": 8.0}]
GPU_NODES = [{"CPU": 4.0}, {"CPU": 32.0, "GPU": 4.0}, {"CPU": 32.0, "GPU": 4.0}]


@pytest.mark.parametrize(
    ("nodes", "overrides", "expected"),
    [
        (LAPTOP, [], ActorPlan(1, 8, 0)),
        (LAPTOP, ["engine.actors=2"], ActorPlan(2, 4, 0)),
        (LAPTOP, ["engine.actors=3", "engine.cpus_per_actor=4"], ActorPlan(2, 4, 0)),
        ([{"CPU": 8.0}, {"CPU": 4.0}], [], ActorPlan(2, 4, 0)),
        (GPU_NODES, [], ActorPlan(8, 8, 1)),
        (GPU_NODES, ["engine.actors=3"], ActorPlan(3, 8, 1)),
        (GPU_NODES, ["engine.actors_per_gpu=4"], ActorPlan(32, 2, 0.25)),
        (GPU_NODES, ["engine.actors_per_gpu=4", "engine.cpus_per_actor=4"], ActorPlan(16, 4, 0.25)),
        (GPU_NODES, ["engine.actors_per_gpu=4", "engine.actors=6"], ActorPlan(6, 2, 0.25)),
        (GPU_NODES, ["model.device=cpu"], ActorPlan(3, 4, 0)),
        (LAPTOP, ["engine.actors_per_gpu=4"], ActorPlan(1, 8, 0)),
    ],
)
def test_actors_are_planned_from_the_nodes(
    nodes: list[dict[str, float]], overrides: list[str], expected: ActorPlan
) -> None:
    assert plan_actors(job(*overrides), nodes) == expected


@pytest.mark.parametrize(
    ("nodes", "overrides", "message"),
    [
        (LAPTOP, ["model.device=cuda"], "no GPU"),
        ([{"CPU": 0.0}], [], "no node with a free CPU"),
        (LAPTOP, ["engine.cpus_per_actor=9"], "9 CPU cores"),
    ],
)
def test_what_cannot_run_is_said(nodes: list[dict[str, float]], overrides: list[str], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        plan_actors(job(*overrides), nodes)
