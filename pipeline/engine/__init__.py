"""Ray: which cluster a job uses, the actors that it starts there, and the bounded loop over shards.

In: job, run, prompts, shards. Out: prompt sets, embeddings and finished shards, in the order in which they finish.
May import: scoring, alfa, prompts, images, storage, schemas.
"""

from pipeline.engine.actors import PromptActor, ScoringActor, obtain_prompts
from pipeline.engine.cluster import ActorPlan, connect, node_resources, plan_actors
from pipeline.engine.errors import EngineError
from pipeline.engine.pool import ScoringPool

__all__ = [
    "ActorPlan",
    "EngineError",
    "PromptActor",
    "ScoringActor",
    "ScoringPool",
    "connect",
    "node_resources",
    "obtain_prompts",
    "plan_actors",
]
