"""Tests the number and size of the actors that are planned on various nodes."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.engine import ActorPlan, EngineError, Node, plan_actors, require_room, uses_gpus, wanted_actors
from schemas.job import JobConfig, parse_job


def job(*overrides: str, **engine: Any) -> JobConfig:
    return parse_job({"dataset": {"images": "x"}, "output": {"uri": "y"}, "engine": engine}, overrides)


def nodes(*resources: dict[str, float], **labels: str) -> list[Node]:
    return [Node(f"node-{number}", each, labels) for number, each in enumerate(resources)]


LAPTOP = nodes({"CPU": 8.0})
HEAD = nodes({"CPU": 0.0})
GPU_NODES = nodes({"CPU": 4.0}, {"CPU": 32.0, "GPU": 4.0}, {"CPU": 32.0, "GPU": 4.0})
UNEQUAL_GPU_NODES = nodes({"CPU": 4.0, "GPU": 1.0}, {"CPU": 32.0, "GPU": 2.0})


@pytest.mark.parametrize(
    ("cluster", "overrides", "expected"),
    [
        (LAPTOP, [], ActorPlan(1, 8, 0)),
        (LAPTOP, ["engine.actors=2"], ActorPlan(2, 4, 0)),
        (LAPTOP, ["engine.actors=3", "engine.cpus_per_actor=4"], ActorPlan(2, 4, 0)),
        (nodes({"CPU": 8.0}, {"CPU": 4.0}), [], ActorPlan(3, 4, 0)),
        (nodes({"CPU": 2.0}, {"CPU": 32.0}, {"CPU": 32.0}), [], ActorPlan(2, 32, 0)),
        (nodes({"CPU": 4.0}, {"CPU": 7.0}), [], ActorPlan(2, 4, 0)),
        (GPU_NODES, [], ActorPlan(8, 8, 1)),
        (GPU_NODES, ["engine.actors=3"], ActorPlan(3, 8, 1)),
        (GPU_NODES, ["engine.actors={min: 2, max: 6}"], ActorPlan(6, 8, 1)),
        (GPU_NODES, ["engine.actors_per_gpu=4"], ActorPlan(32, 2, 0.25)),
        (GPU_NODES, ["engine.actors_per_gpu=3"], ActorPlan(24, 2, 1 / 3)),
        (GPU_NODES, ["engine.actors_per_gpu=4", "engine.cpus_per_actor=4"], ActorPlan(16, 4, 0.25)),
        (GPU_NODES, ["engine.actors_per_gpu=4", "engine.actors=6"], ActorPlan(6, 2, 0.25)),
        (GPU_NODES, ["model.device=cpu"], ActorPlan(2, 32, 0)),
        (UNEQUAL_GPU_NODES, [], ActorPlan(3, 4, 1)),
        (LAPTOP, ["engine.actors_per_gpu=4"], ActorPlan(1, 8, 0)),
        (HEAD, [], ActorPlan(0, 1, 0)),
        (HEAD, ["model.device=cuda"], ActorPlan(0, 1, 1)),
    ],
)
def test_actors_are_planned_from_the_nodes(cluster: list[Node], overrides: list[str], expected: ActorPlan) -> None:
    night = job(*overrides)
    assert plan_actors(night, cluster, uses_gpus(night, cluster, grows=False)) == expected


def test_an_actor_uses_its_part_of_its_own_node() -> None:
    engine, (small, large) = job().engine, UNEQUAL_GPU_NODES
    plan = ActorPlan(3, 4, 1)
    assert (plan.cores(small, engine), plan.cores(large, engine)) == (4, 16)
    assert ActorPlan(3, 4, 0).cores(Node("n", {"CPU": 10.0}), engine) == 5


def test_only_nodes_with_the_labels_and_resources_of_the_job_count() -> None:
    spot = nodes({"CPU": 8.0, "GPU": 1.0, "fast_disk": 1.0}, {"CPU": 8.0, "GPU": 1.0}, market="spot")
    own = nodes({"CPU": 8.0, "GPU": 1.0, "fast_disk": 1.0})
    wanted = job(labels={"market": "spot"}, resources={"fast_disk": 0.5})
    assert plan_actors(wanted, [*spot, *own], True) == ActorPlan(1, 8, 1)
    with pytest.raises(EngineError, match=r"no node has .*0.5 fast_disk and the label market=spot; .* 1 node with"):
        require_room(wanted, plan_actors(wanted, own, True), own)


@pytest.mark.parametrize(
    ("device", "cluster", "grows", "expected"),
    [
        ("auto", LAPTOP, False, False),
        ("auto", LAPTOP, True, True),
        ("auto", GPU_NODES, False, True),
        ("cpu", GPU_NODES, True, False),
        ("cuda", HEAD, False, True),
    ],
)
def test_a_cluster_that_may_bring_a_gpu_is_not_scored_on_the_cpu_of_its_head(
    device: str, cluster: list[Node], grows: bool, expected: bool
) -> None:
    assert uses_gpus(job(f"model.device={device}"), cluster, grows) is expected


@pytest.mark.parametrize(
    ("actors", "room", "placed", "useful", "grows", "expected"),
    [
        ("auto", 4, 4, 1000, False, 4),
        ("auto", 4, 4, 3, False, 3),
        ("auto", 0, 0, 1000, False, 1),
        ("auto", 0, 0, 1000, True, 8),
        ("auto", 20, 20, 1000, True, 40),
        ("auto", 0, 0, 5, True, 5),
        (100, 0, 0, 40, True, 40),
        (6, 4, 4, 1000, False, 6),
        ({"min": 2, "max": 6}, 0, 0, 1000, False, 2),
        ({"min": 2, "max": 6}, 4, 4, 1000, True, 6),
        ({"min": 2, "max": 6}, 4, 4, 1, True, 1),
        ("auto", 4, 4, 0, True, 0),
    ],
)
def test_actors_are_asked_for_as_far_as_there_is_work(
    actors: Any, room: int, placed: int, useful: int, grows: bool, expected: int
) -> None:
    assert wanted_actors(job(actors=actors).engine, ActorPlan(room, 8, 1), placed, useful, grows) == expected


@pytest.mark.parametrize(
    ("cluster", "overrides", "message"),
    [
        (LAPTOP, ["model.device=cuda"], "no GPU"),
        (HEAD, [], "no node with a free CPU"),
        (LAPTOP, ["engine.cpus_per_actor=9"], "9 CPU cores"),
    ],
)
def test_what_cannot_run_is_said(cluster: list[Node], overrides: list[str], message: str) -> None:
    night = job(*overrides)
    with pytest.raises(EngineError, match=message):
        require_room(night, plan_actors(night, cluster, uses_gpus(night, cluster, grows=False)), cluster)
