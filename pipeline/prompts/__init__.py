"""Prompts: descriptions of normal and defective parts, asked of an LLM once per class and kept in the lake.

In: class names. Out: prompt ensembles, and what the LLM cost.
May import: storage, schemas. Only llm.py imports litellm.
"""

from pipeline.prompts.compose import compose_ensemble, record_prompts
from pipeline.prompts.library import PromptLibraryError, find, find_or_make, make_offline, obtain
from pipeline.prompts.llm import LLMError, require_askable, try_model

__all__ = [
    "LLMError",
    "PromptLibraryError",
    "compose_ensemble",
    "find",
    "find_or_make",
    "make_offline",
    "obtain",
    "record_prompts",
    "require_askable",
    "try_model",
]
