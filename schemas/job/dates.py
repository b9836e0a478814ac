"""Which day a job's night is, and dates in its addresses: s3://factory/photos/{run_date:%Y/%m/%d}."""

from __future__ import annotations

import copy
import datetime
import re
import string
from collections.abc import Iterator, Mapping
from typing import Any
from zoneinfo import ZoneInfo

ADDRESSES = (("dataset", "images"), ("references", "images"), ("threshold", "table"))
"""Keys of a job that may hold the date of the night."""

_DIRECTIVES = frozenset("YymdjGVuaAbBUWw%")
"""What strftime knows of a day; a night has no hour."""

_KNOWN = "{run_date}, or as strftime writes a date, such as {run_date:%Y/%m/%d}"


def resolve_dates(document: Mapping[str, Any], now: datetime.datetime) -> dict[str, Any]:
    """Puts the date of the night into a job's document.

    `run_date` may be `today` (where it is missing, too) or `yesterday`: the day that it is, or was, in the job's
    `timezone` at `now`. Raises ValueError with a line for each fault; what is wrong in another way is left as it is.
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
    """An address with the date in place of {run_date} and {run_date:FORMAT}; doubled braces become single ones.

    Raises ValueError for other placeholders, by name.
    """
    return "".join(_fill_in(address, run_date))


def escape_braces(address: str) -> str:
    """Writes an address so that fill_in gives it back."""
    return address.replace("{", "{{").replace("}", "}}")


def _find_date(document: Mapping[str, Any], now: datetime.datetime) -> datetime.date | None:
    """The night of a job's document; None where it says nothing that is a date, which is told of elsewhere."""
    name = document.get("timezone") or "UTC"
    try:
        today = now.astimezone(ZoneInfo(name)).date()
    except (KeyError, ValueError, TypeError, OSError):  # of no such name, or of none that can be one
        raise ValueError(
            f"timezone: no such time zone; name one of the IANA's, such as Europe/Berlin (given: {str(name)[:80]!r})"
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
            f"a brace that is part of the address is written twice, {{{{ or }}}}; placeholders are {_KNOWN}"
        ) from None
    for text, name, form, conversion in parts:
        yield text
        if name is None:
            continue
        if name != "run_date" or conversion:
            raise ValueError(
                f"no such placeholder: {{{name}}}; there is {_KNOWN}. A brace that is part of the address is written "
                f"twice, {{{{ or }}}}"
            )
        directives = re.findall(r"%(.?)", form or "")
        if unknown := [f"%{directive}" for directive in directives if directive not in _DIRECTIVES or not directive]:
            raise ValueError(f"{{run_date:{form}}} has {unknown[0]}, which a day does not have; there is {_KNOWN}")
        yield run_date.strftime(form) if form else run_date.isoformat()
