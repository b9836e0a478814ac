"""The prompt actor on real Ray, against a real HTTP server: one request a class, ever."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipeline.engine import PromptActor, obtain_prompts
from schemas.job import parse_job
from tests.llm_server import LLMServer

CLASSES = [f"class {number}" for number in range(5)]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_eight_concurrent_callers_make_one_request_a_class_and_a_second_job_none(cluster: None, tmp_path: Path) -> None:
    with LLMServer() as server:
        job = parse_job(
            {
                "dataset": {"images": "x"},
                "output": {"uri": str(tmp_path)},
                "prompts": {"llm": "openai/test", "api_base": server.api_base},
            }
        )
        actor = ray.remote(PromptActor).options(num_cpus=0).remote(job, "first")

        @ray.remote(num_cpus=0.1)
        def call_all(handle: object) -> list[str]:
            return [item.class_name for item in ray.get([handle.obtain.remote(name) for name in CLASSES])]  # type: ignore[attr-defined]

        assert ray.get([call_all.remote(actor) for _ in range(8)]) == [CLASSES] * 8
        assert server.requests == dict.fromkeys(CLASSES, 1)
        assert [item.source for item in obtain_prompts(job, CLASSES, "second")] == ["llm"] * 5
        assert sum(server.requests.values()) == 5
