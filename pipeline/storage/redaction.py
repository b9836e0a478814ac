"""Blanks secrets in messages before they reach logs, rows, reports or run folders."""

from __future__ import annotations

import os
import re

from schemas.text import one_line

_SECRET_NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
_SHORTEST_SECRET = 8
_PATTERNS = (
    (re.compile(r"\b((?:sk|hf|ghp)[-_][\w*.-]{6,}|(?:AKIA|ASIA)[A-Z0-9]{12,})"), "***"),
    (re.compile(r"(?i)\bbearer [\w*.=+/-]{6,}|(?<=authorization: )basic \S+"), "***"),
    (re.compile(r"(\w+://)[^/\s@]+@"), r"\1***@"),
    (
        re.compile(
            r"(?i)\b((?:x-amz-)?(?:signature|security-token|credential|sig|token|password|api[-_]?key)=)[^&\s'\"]+"
        ),
        r"\1***",
    ),
)


def redact(text: str) -> str:
    """Returns the text on one line with secrets blanked, because servers and clients quote them in their errors.

    Secrets are the values of secret environment variables, credentials in URLs, signatures of presigned URLs, and
    whatever looks like an API key.
    """
    text = one_line(text)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and any(word in name.upper() for word in _SECRET_NAMES):
            text = text.replace(value, "***")
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
