"""How many scoring actors of what size a job wants on a cluster: the policy, without Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.engine.errors import EngineError
from schemas.job import Engine, JobConfig

_FIRST_ASKED = 8
"""Actors that an autoscaler is asked for where none works yet; later, as many again as work. So a cluster without an
upper limit grows by doubling."""

_USED = 0.75
"""Share of the cores that actors on CPU should use: as few and as large actors as do it."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster that is alive. resources: CPU, GPU and custom ones."""

    node_id: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    def amount(self, resource: str) -> float:
        """How much of a resource the node has, whether in use or not."""
        return self.resources.get(resource, 0)


@dataclass(frozen=True)
class ActorPlan:
    """How many scoring actors have room, and the CPU cores and GPUs that each reserves; a shared GPU is a fraction."""

    count: int
    cpus: int
    gpus: float

    def slots(self, node: Node, engine: Engine) -> int:
        """How many of these actors fit on a node."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, **engine.resources}
        if any(node.labels.get(name) != value for name, value in engine.labels.items()):
            return 0
        return min(int(node.amount(name) / amount + 1e-9) for name, amount in asked.items() if amount)

    def cores(self, node: Node, engine: Engine) -> int:
        """CPU cores that each of these actors may use on a node: what it reserves, and its part of what is left."""
        return max(self.cpus, int(node.amount("CPU")) // max(self.slots(node, engine), 1))


def plan_actors(job: JobConfig, nodes: Sequence[Node], on_gpus: bool) -> ActorPlan:
    """Plans the scoring actors on a cluster; none where no node fits, see require_room.

    With engine.actors auto, each GPU gets engine.actors_per_gpu of them; without GPUs, all cores are used by actors
    that are as large as the nodes allow.
    """
    engine = job.engine
    gpus = 1 / engine.actors_per_gpu if on_gpus else 0.0
    least = ActorPlan(0, 1, gpus)
    hosts = [node for node in nodes if least.slots(node, engine)]
    most = engine.actor_range[1]
    if engine.cpus_per_actor != "auto":
        cpus = engine.cpus_per_actor
    elif not hosts:
        cpus = 1
    elif on_gpus:
        cpus = max(1, min(int(node.amount("CPU") * gpus / node.amount("GPU")) for node in hosts))
    else:
        fixed = engine.actors if isinstance(engine.actors, int) else len(hosts)
        cpus = _fit([max(1, int(node.amount("CPU")) // -(-fixed // len(hosts))) for node in hosts])
    plan = ActorPlan(0, cpus, gpus)
    room = sum(plan.slots(node, engine) for node in nodes)
    return ActorPlan(room if most is None else min(room, most), cpus, gpus)


def uses_gpus(job: JobConfig, nodes: Sequence[Node], grows: bool) -> bool:
    """Whether the job is scored on GPUs: with device auto where a node has one, or an autoscaler may bring one."""
    if job.model.device == "auto":
        return grows or any(node.amount("GPU") >= 1 for node in nodes)
    return job.model.device == "cuda"


def _fit(cores: Sequence[int]) -> int:
    """Cores for an actor, of which each node takes as many as fit: the largest of these sizes that uses most of the
    cores, or that which uses the most."""
    enough = _USED * sum(cores)
    return max(cores, key=lambda size: (min(sum(node // size * size for node in cores), enough), size))


def wanted_actors(engine: Engine, plan: ActorPlan, placed: int, useful: int, grows: bool) -> int:
    """How many actors there should be now, those included that have no node yet.

    placed: actors that have one. useful: actors that would have something to do: more would start nodes for nothing.
    """
    least, most = engine.actor_range
    room = plan.count + (max(_FIRST_ASKED, placed) if grows else 0)
    wanted = min(max(least, room), useful)
    return wanted if most is None else min(wanted, most)


def require_room(job: JobConfig, plan: ActorPlan, nodes: Sequence[Node]) -> None:
    """Raises EngineError where no node has room for a scoring actor; it says what is missing."""
    if plan.count:
        return
    if plan.gpus and not any(node.amount("GPU") >= 1 for node in nodes):
        raise EngineError("model.device is cuda, but the cluster has no GPU; add GPU nodes or set model.device=auto")
    if not any(node.amount("CPU") >= 1 for node in nodes):
        raise EngineError("the cluster has no node with a free CPU core to score on")
    raise EngineError(f"no node has {describe_need(job, plan)}; the cluster has {describe_nodes(nodes)}")


def describe_need(job: JobConfig, plan: ActorPlan) -> str:
    """What a node must have for a scoring actor, in words."""
    need = [f"{plan.cpus} CPU core{'s' * (plan.cpus > 1)}"]
    if plan.gpus:
        need.append("a GPU" if plan.gpus == 1 else f"{plan.gpus:g} of a GPU")
    need += [f"{amount:g} {name}" for name, amount in job.engine.resources.items()]
    need += [f"the label {name}={value}" for name, value in job.engine.labels.items()]
    return " and ".join((", ".join(need[:-1]), need[-1])) if len(need) > 1 else need[0]


def describe_nodes(nodes: Sequence[Node]) -> str:
    """What a cluster has, in words."""
    cpus, gpus = (sum(node.amount(kind) for node in nodes) for kind in ("CPU", "GPU"))
    return f"{len(nodes)} node{'s' * (len(nodes) != 1)} with {cpus:g} CPU cores and {gpus:g} GPUs in all"
