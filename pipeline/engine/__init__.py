"""Runs a job on Ray: joins or starts a cluster, starts actors there, and feeds them with shards in a bounded loop.

In: job, run, prompts, shards. Out: prompt sets, embeddings, and stats of shards in the order in which they finish.
May import: scoring, alfa, prompts, images, storage, schemas.
"""

from pipeline.engine.actors import PromptActor, ScoringActor, obtain_prompts
from pipeline.engine.cluster import can_grow, connect, is_local, list_nodes
from pipeline.engine.decoders import Decoder, DecoderPool
from pipeline.engine.errors import EngineError
from pipeline.engine.plan import ActorPlan, Node, describe_nodes, plan_actors, require_room, uses_gpus, wanted_actors
from pipeline.engine.pool import ScoringPool

__all__ = [
    "ActorPlan",
    "Decoder",
    "DecoderPool",
    "EngineError",
    "Node",
    "PromptActor",
    "ScoringActor",
    "ScoringPool",
    "can_grow",
    "connect",
    "describe_nodes",
    "is_local",
    "list_nodes",
    "obtain_prompts",
    "plan_actors",
    "require_room",
    "uses_gpus",
    "wanted_actors",
]
