"""One Ray that the tests of a process share, unless they kill it or need their own."""

from __future__ import annotations

import os

import ray


def share_ray() -> None:
    """Sees to a Ray in this process, as large as a job's own, which pipeline.engine.connect finds; it stays up.

    Its workers have the environment that it was started in, with an API key that LLMServer takes. A test that needs
    this process without it begins with ray.shutdown().
    """
    if ray.is_initialized():
        return
    os.environ["OPENAI_API_KEY"] = "sk-test"
    try:
        ray.init(address="local", include_dashboard=False, log_to_driver=False)
    finally:
        del os.environ["OPENAI_API_KEY"]
