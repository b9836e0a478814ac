"""Parses a report's page as a browser would, and has texts that try to break out of it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

HOSTILE = (
    "<script>window.planted=1</script>",
    "</script><script>window.planted=1</script>",
    "<!--<script>",
    "\"'><img src=x onerror=window.planted=1>",
    "{{ 7*7 }}{% raw %}",
    "javascript:window.planted=1",
)


class Page(HTMLParser):
    """The elements and the text of a page, and the JSON that its script reads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: str | None = None
        self.scripts: list[str] = []
        self.feed(html)
        self.data: dict[str, Any] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())
