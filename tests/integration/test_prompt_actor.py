"""Tests the prompt actor on real Ray with a real HTTP server: there is only ever one request per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.engine import PromptActor, obtain_prompts
from schemas.job import parse_job
from tests.llm_server import LLMServer
from tests.shared_ray import share_ray


def make_caller() -> Any:
    """A class of actors that stand for a job's scoring actors. Made here, it travels by value, so that their processes
    need not import torch: 32 of them fit on a laptop."""

    class Caller:
        def call(self, prompt_actor: Any, classes: list[str]) -> list[str]:
            """Asks for all at once; the names of what came back."""
            return [item.class_name for item in ray.get([prompt_actor.obtain.remote(name) for name in classes])]

    return ray.remote(Caller).options(num_cpus=0)


@pytest.mark.parametrize(("jobs", "actors", "classes"), [(1, 2, 3), pytest.param(4, 8, 12, marks=pytest.mark.slow)])
def test_one_request_a_class_whoever_asks(tmp_path: Path, jobs: int, actors: int, classes: int) -> None:
    """Several jobs with a prompt actor each, asked by all their actors at once; and a later job."""
    share_ray()
    names = [f"class {number}" for number in range(classes)]
    with LLMServer() as server:
        job = parse_job(
            {
                "dataset": {"images": "x"},
                "output": {"uri": str(tmp_path)},
                "prompts": {"llm": "openai/test", "api_base": server.api_base},
            }
        )
        prompt_actors = [ray.remote(PromptActor).options(num_cpus=0).remote(job, f"job {n}") for n in range(jobs)]
        caller = make_caller()
        callers = [(caller.remote(), prompt_actor) for prompt_actor in prompt_actors for _ in range(actors)]
        answers = ray.get([one.call.remote(prompt_actor, names) for one, prompt_actor in callers])
        assert answers == [names] * (jobs * actors)
        assert server.requests == dict.fromkeys(names, 1)
        assert [item.source for item in obtain_prompts(job, names, "later")] == ["llm"] * classes
        assert sum(server.requests.values()) == classes
