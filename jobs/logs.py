"""Sets up logging: lines for people, or one JSON object per line for machines; secrets are blanked in both."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from enum import Enum
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from pipeline.storage import redact

_facts: dict[str, Any] = {}


class LogFormat(str, Enum):
    """The values of --log-format."""

    TEXT = "text"
    JSON = "json"


_format = LogFormat.TEXT


class RedactingFilter(logging.Filter):
    """Blanks secrets in every record and its traceback; keeps all records."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact_lines(record.getMessage()), None
        if record.exc_info:
            record.exc_text = redact_lines(logging.Formatter().formatException(record.exc_info))
        return True


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object on one line.

    Keys: time (UTC), level, logger, message, the facts given to bind(), and exception if there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_facts,
        }
        if record.exc_text:
            entry["exception"] = record.exc_text
        return json.dumps(entry, ensure_ascii=False)


def redact_lines(text: str) -> str:
    """Blanks the secrets in each line of a text."""
    return "\n".join(redact(line) for line in text.splitlines())


def bind(**facts: Any) -> None:
    """Adds facts, such as run_id=..., to every JSON line from now on."""
    _facts.update(facts)


def configure(log_format: LogFormat) -> None:
    """Makes this process log to stderr; replaces an earlier configuration."""
    global _format
    _format = log_format
    handler = _handler(log_format)
    handler.addFilter(RedactingFilter())
    logging.basicConfig(level=logging.WARNING, format="%(message)s", datefmt="%H:%M:%S", handlers=[handler], force=True)
    for name in ("pipeline", "jobs"):
        logging.getLogger(name).setLevel(logging.INFO)


def adopt_libraries() -> None:
    """Sends the logs of Ray and huggingface_hub through alfa's handlers, and drops all but warnings and errors.

    Both set up their own handlers when they are imported; so call it after the import of ray. Of huggingface_hub only
    errors are kept: it warns of every retry, and if all fail, alfa's own error says so.
    """
    import huggingface_hub.utils.logging  # noqa: F401  # else open_clip imports it later

    for name, level in (("ray", logging.WARNING), ("huggingface_hub", logging.ERROR)):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(level)


def current_format() -> LogFormat:
    """Returns the format that configure() has set up."""
    return _format


def _handler(log_format: LogFormat) -> logging.Handler:
    if log_format is LogFormat.TEXT and sys.stderr.isatty():
        return RichHandler(console=Console(stderr=True), show_path=False, markup=False)
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    handler.setFormatter(JsonFormatter() if log_format is LogFormat.JSON else text)
    return handler
