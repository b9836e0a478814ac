"""Text from outside (class names, keys, what an LLM writes) is data: never a command to a terminal, a log or a page."""

from __future__ import annotations


def one_line(text: str) -> str:
    """On one line, without control characters: runs of white space become one space, other unprintables go."""
    return "".join(char for char in " ".join(text.split()) if char.isprintable()).strip()
