"""Decides the number and size of a job's scoring actors on a cluster. It does not use Ray."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.engine.errors import EngineError
from schemas.job import Engine, JobConfig

_FIRST_REQUEST = 8
"""Actors that are requested from an autoscaler while none has a node. Later, as many as have a node are requested in
addition, so that a cluster without an upper limit grows by doubling."""

_SHARE_OF_CORES = 0.75
"""Share of all cores that actors on CPU should use at least. Among the sizes that do, the largest is taken."""


@dataclass(frozen=True)
class Node:
    """A live node of the cluster. resources: amounts of CPU, GPU and custom resources, by name."""

    node_id: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    def amount(self, resource: str) -> float:
        """Returns the total amount of a resource on the node, whether in use or not."""
        return self.resources.get(resource, 0)


def away_from(node_ids: Collection[str]) -> dict[str, str]:
    """Returns the label selector of actors that must not be placed on these nodes."""
    return {"ray.io/node-id": f"!in({','.join(sorted(node_ids))})"} if node_ids else {}


@dataclass(frozen=True)
class ActorPlan:
    """The number of scoring actors that fit, and the CPU cores and GPUs of each; a share of a GPU is a fraction."""

    count: int
    cpus: int
    gpus: float

    def slots(self, node: Node, engine: Engine) -> int:
        """Returns how many of these actors fit on a node."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, **engine.resources}
        if any(node.labels.get(name) != value for name, value in engine.labels.items()):
            return 0
        return min(int(node.amount(name) / amount + 1e-9) for name, amount in asked.items() if amount)

    def cores(self, node: Node, engine: Engine) -> int:
        """Returns the CPU cores that each actor may use on a node: an equal share, at least what it reserves."""
        return max(self.cpus, int(node.amount("CPU")) // max(self.slots(node, engine), 1))


def plan_actors(job: JobConfig, nodes: Sequence[Node], on_gpus: bool) -> ActorPlan:
    """Plans the scoring actors on a cluster. The count is 0 if no node can run one, see require_room.

    With engine.actors auto, each GPU gets engine.actors_per_gpu actors. Without GPUs, actors are as large as the nodes
    allow, and use all cores.
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
        cpus = _choose_cores([max(1, int(node.amount("CPU")) // -(-fixed // len(hosts))) for node in hosts])
    plan = ActorPlan(0, cpus, gpus)
    room = sum(plan.slots(node, engine) for node in nodes)
    return ActorPlan(room if most is None else min(room, most), cpus, gpus)


def uses_gpus(job: JobConfig, nodes: Sequence[Node], grows: bool) -> bool:
    """Whether the job is scored on GPUs. With device auto it is if a node has one, or an autoscaler may add one."""
    if job.model.device == "auto":
        return grows or any(node.amount("GPU") >= 1 for node in nodes)
    return job.model.device == "cuda"


def _choose_cores(cores: Sequence[int]) -> int:
    """Chooses the cores of an actor, given the cores of each node.

    The candidates are these numbers. Returns the largest one with which the actors that fit use 75 % of all cores; if
    none does, the one that uses the most cores.
    """
    enough = _SHARE_OF_CORES * sum(cores)
    return max(cores, key=lambda size: (min(sum(node // size * size for node in cores), enough), size))


def wanted_actors(engine: Engine, plan: ActorPlan, placed: int, useful: int, grows: bool) -> int:
    """Returns how many actors there should be now, including those that have no node yet.

    placed: number of actors that have a node. useful: number of actors for which there is work; more would make an
    autoscaler start nodes in vain. grows: whether an autoscaler may add nodes.
    """
    least, most = engine.actor_range
    room = plan.count + (max(_FIRST_REQUEST, placed) if grows else 0)
    wanted = min(max(least, room), useful)
    return wanted if most is None else min(wanted, most)


def require_room(job: JobConfig, plan: ActorPlan, nodes: Sequence[Node]) -> None:
    """Raises EngineError if no node can run a scoring actor; the message says what is missing."""
    if plan.count:
        return
    if plan.gpus and not any(node.amount("GPU") >= 1 for node in nodes):
        raise EngineError("model.device is cuda, but the cluster has no GPU; add GPU nodes or set model.device=auto")
    if not any(node.amount("CPU") >= 1 for node in nodes):
        raise EngineError("the cluster has no node with a free CPU core to score on")
    raise EngineError(f"no node has {describe_need(job, plan)}; the cluster has {describe_nodes(nodes)}")


def describe_need(job: JobConfig, plan: ActorPlan) -> str:
    """Describes what a node must have for a scoring actor."""
    need = [f"{plan.cpus} CPU core{'s' * (plan.cpus > 1)}"]
    if plan.gpus:
        need.append("a GPU" if plan.gpus == 1 else f"{plan.gpus:g} of a GPU")
    need += [f"{amount:g} {name}" for name, amount in job.engine.resources.items()]
    need += [f"the label {name}={value}" for name, value in job.engine.labels.items()]
    return " and ".join((", ".join(need[:-1]), need[-1])) if len(need) > 1 else need[0]


def describe_nodes(nodes: Sequence[Node]) -> str:
    """Describes the nodes, CPU cores and GPUs of a cluster."""
    cpus, gpus = (sum(node.amount(kind) for node in nodes) for kind in ("CPU", "GPU"))
    return f"{len(nodes)} node{'s' * (len(nodes) != 1)} with {cpus:g} CPU cores and {gpus:g} GPUs in all"
