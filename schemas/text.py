"""Cleans text from outside (class names, keys, an LLM's answers), so that it cannot control a terminal, log or page."""

from __future__ import annotations


def one_line(text: str) -> str:
    """Returns the text on one line: runs of white space become one space, other unprintable characters are removed."""
    return "".join(char for char in " ".join(text.split()) if char.isprintable()).strip()
