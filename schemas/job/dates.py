"""The date of a job's night, and dates in its addresses, such as s3://factory/photos/{run_date:%Y/%m/%d}."""

from __future__ import annotations

import copy
import datetime
import re
import string
from collections.abc import Iterator, Mapping
from typing import Any
from zoneinfo import ZoneInfo

ADDRESSES = (("dataset", "images"), ("references", "images"), ("threshold", "table"))
"""Section and key of the addresses that may contain the date of the night."""

_DIRECTIVES = frozenset("YymdjGVuaAbBUWw%")
"""Directives of strftime that concern a day; those of the time of day are refused."""

_ALLOWED = "{run_date}, or with a format of strftime, such as {run_date:%Y/%m/%d}"


def resolve_dates(document: Mapping[str, Any], now: datetime.datetime) -> dict[str, Any]:
    """Returns a copy of a job's document with the date of the night filled in.

    `run_date` may be a date, `today` (the default) or `yesterday`, seen from `now` in the job's `timezone`. Raises
    ValueError with one line per fault of a date or placeholder. Other faults are left for JobConfig to report.
    """
    resolved: dict[str, Any] = copy.deepcopy(dict(document))
    run_date = _find_date(resolved, now)
    if run_date is None:
        return resolved
    resolved["run_date"] = run_date.isoformat()
    faults = []
    for section, key in ADDRESSES:
        part = resolved.get(section)
        if isinstance(part, dict) and isinstance(part.get(key), str):
            try:
                part[key] = fill_in(part[key], run_date)
            except ValueError as error:
                faults.append(f"{section}.{key}: {error}")
    if faults:
        raise ValueError("\n".join(faults))
    return resolved


def fill_in(address: str, run_date: datetime.date) -> str:
    """Replaces {run_date} and {run_date:FORMAT} in an address by the date; doubled braces become single ones.

    Raises ValueError for any other placeholder and names it.
    """
    return "".join(_fill_in(address, run_date))


def escape_braces(address: str) -> str:
    """Doubles the braces of an address, so that fill_in returns the address."""
    return address.replace("{", "{{").replace("}", "}}")


def _find_date(document: Mapping[str, Any], now: datetime.datetime) -> datetime.date | None:
    """Returns the date of the night; None where run_date is no date, which JobConfig reports."""
    name = document.get("timezone") or "UTC"
    try:
        today = now.astimezone(ZoneInfo(name)).date()
    except (KeyError, ValueError, TypeError, OSError):  # ZoneInfo raises each of them for some wrong name
        raise ValueError(
            f"timezone: no such time zone; use an IANA name, such as Europe/Berlin (given: {str(name)[:80]!r})"
        ) from None
    given = document.get("run_date")
    if given in (None, "today"):
        return today
    if given == "yesterday":
        return today - datetime.timedelta(days=1)
    try:
        return datetime.date.fromisoformat(str(given))
    except ValueError:
        return None


def _fill_in(address: str, run_date: datetime.date) -> Iterator[str]:
    try:
        parts = list(string.Formatter().parse(address))
    except ValueError:
        raise ValueError(
            f"write a brace that belongs to the address twice, {{{{ or }}}}; allowed placeholders: {_ALLOWED}"
        ) from None
    for text, name, form, conversion in parts:
        yield text
        if name is None:
            continue
        if name != "run_date" or conversion:
            raise ValueError(
                f"no such placeholder: {{{name}}}; allowed: {_ALLOWED}. Write a brace that belongs to the address "
                f"twice, {{{{ or }}}}"
            )
        directives = re.findall(r"%(.?)", form or "")
        if unknown := [f"%{directive}" for directive in directives if directive not in _DIRECTIVES or not directive]:
            raise ValueError(f"{{run_date:{form}}}: {unknown[0]} is not part of a date; allowed: {_ALLOWED}")
        yield run_date.strftime(form) if form else run_date.isoformat()
