"""What the driver knows of its cluster: the nodes, the actors that fit on them, and whether the head answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence

from pipeline.engine.cluster import can_grow, is_local, list_nodes
from pipeline.engine.errors import EngineError
from pipeline.engine.head import REFRESH_EVERY_S, HeadWatch
from pipeline.engine.plan import (
    ActorPlan,
    Node,
    describe_need,
    describe_nodes,
    plan_actors,
    require_room,
    uses_gpus,
)
from schemas.job import JobConfig

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 60.0
"""Seconds between two log lines that say that the driver waits for nodes."""


class ClusterView:
    """The cluster as it was at the last look. While the head is silent, nothing can be started, and the rest stays.

    plan: the actors that fit on the live nodes. grows: whether an autoscaler may add nodes.
    """

    def __init__(self, job: JobConfig) -> None:
        """Looks at the cluster. Raises EngineError as refresh() does."""
        self.plan = ActorPlan(0, 1, 0)
        self.grows = False
        self._job = job
        self._head = HeadWatch()
        self._nodes: list[Node] = []
        self._excluded: set[str] = set()
        self._on_gpus: bool | None = None
        self._logged = self._without_node_since = time.monotonic()
        self.refresh()

    @property
    def decided(self) -> bool:
        """Whether it is known that the night is scored on CPUs or on GPUs."""
        return self._on_gpus is not None

    @property
    def silent(self) -> bool:
        """Whether the head did not answer at the last look."""
        return self._head.silent

    @property
    def excluded(self) -> Collection[str]:
        """Ids of the nodes that get no actor."""
        return self._excluded

    def refresh_when_due(self) -> None:
        """Calls refresh() if the last look is five seconds old."""
        if time.monotonic() - self._refreshed >= REFRESH_EVERY_S:
            self.refresh()

    def refresh(self) -> None:
        """Looks at the nodes, and plans the actors that fit on them.

        Raises EngineError if the head is silent for too long or was started again, or a local Ray cannot run an actor.
        """
        self._refreshed = time.monotonic()
        self._head.ask()
        if not self.silent:
            self.grows = can_grow(self._job)
            self._nodes = list_nodes()
            self._plan()

    def exclude(self, node_id: str) -> None:
        """Plans without a node from now on."""
        self._excluded.add(node_id)
        self._plan()

    def _plan(self) -> None:
        job = self._job
        self._nodes = [node for node in self._nodes if node.node_id not in self._excluded]
        if self._on_gpus is None:
            on_gpus = uses_gpus(job, self._nodes, self.grows)
            # A night is scored either on CPUs or on GPUs. If there is no node yet, the first one decides.
            if on_gpus or is_local(job) or plan_actors(job, self._nodes, on_gpus).count:
                self._on_gpus = on_gpus
        self.plan = plan_actors(job, self._nodes, bool(self._on_gpus))
        if is_local(job):
            require_room(job, self.plan, self._nodes)

    def has_room_beside(self, node_id: str) -> bool:
        """Whether an actor fits on another node than this one."""
        return any(self.plan.slots(node, self._job.engine) for node in self._nodes if node.node_id != node_id)

    def unexplained(self, deaths: Sequence[str | None]) -> list[str | None]:
        """Returns the deaths that the loss of a node does not explain. deaths: the nodes of workers that died."""
        if not deaths:
            return []
        alive = {node.node_id for node in self._nodes}
        return [node_id for node_id in deaths if node_id is None or node_id in alive]

    def await_node(self, placed: bool) -> None:
        """Logs from time to time that no actor has a node. Raises EngineError if no suitable node has come in time.

        placed: whether an actor has a node. While the head is silent, nothing happens.
        """
        now, job = time.monotonic(), self._job
        if placed or self.silent:
            self._without_node_since = now
            return
        need, has = describe_need(job, self.plan), describe_nodes(self._nodes)
        left = job.engine.wait_for_nodes_s - (now - self._without_node_since)
        if left <= 0 and not self.plan.count:
            raise EngineError(
                f"no node with {need} has come within {job.engine.wait_for_nodes_s:g} s (engine.wait_for_nodes_s); the "
                f"cluster has {has}. Check its autoscaler, or score on CPU with model.device=cpu"
            )
        # If a node fits, the actor is only starting; if none does, say so at once.
        soon = not self.plan.count and self._logged <= self._without_node_since
        if now - self._logged < (REFRESH_EVERY_S if soon else _LOG_EVERY_S):
            return
        self._logged = now
        if self.plan.count:
            logger.warning("no scoring actor has started; waiting until a node has %s free", need)
        else:
            logger.warning("waiting up to %.0f s more for a node with %s; the cluster has %s", left, need, has)
