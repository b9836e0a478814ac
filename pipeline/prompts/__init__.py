"""Prompts: the base ensemble, bundled and LLM descriptions, and the write-once library that keeps them."""

from pipeline.prompts.compose import compose_ensemble, record_prompts
from pipeline.prompts.library import PromptLibraryError, find, obtain
from pipeline.prompts.llm import LLMError, missing_key

__all__ = ["LLMError", "PromptLibraryError", "compose_ensemble", "find", "missing_key", "obtain", "record_prompts"]
