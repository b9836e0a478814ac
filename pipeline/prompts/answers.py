"""Reads the description in an LLM's answer: lenient in form, strict in substance."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from schemas.prompts import ClassDescription
from schemas.text import one_line

_LONGEST_ANSWER = 200_000
_MOST_OBJECTS = 200
_DECODER = json.JSONDecoder(strict=False)


def read_description(text: str) -> ClassDescription:
    """Finds the description in an answer. Prose, code fences and drafts around it are ignored; the last one wins.

    Also accepted are keys and domain in any case, additional keys, and defects written as `name: look`. Items that are
    not text, or repeat another, do not count. Raises ValueError with the fault, worded for the LLM.
    """
    if len(text) > _LONGEST_ANSWER:
        raise ValueError(f"the answer has {len(text)} characters, more than {_LONGEST_ANSWER}")
    found: ClassDescription | None = None
    fault, longest = "there is no JSON object in the answer", 0
    start = text.find("{")
    for _ in range(_MOST_OBJECTS):
        if start < 0:
            break
        outcome, end = _read_object(text, start)
        if isinstance(outcome, ClassDescription):
            found, start = outcome, text.find("{", end)
            continue
        if end - start > longest:
            fault, longest = outcome, end - start
        start = text.find("{", start + 1)  # the description may be nested in another object
    if found is None:
        raise ValueError(fault)
    return found


def _read_object(text: str, start: int) -> tuple[ClassDescription | str, int]:
    """Reads the object that begins at `start`. Returns the description, or what is wrong with it, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        return f"the JSON is broken: {error.msg} at character {error.pos - start} of the object", error.pos
    except RecursionError:
        return "the JSON is nested too deeply", start + 1
    try:
        return _describe(value), end
    except ValueError as error:
        return str(error), end


def _describe(answer: dict[str, Any]) -> ClassDescription:
    known = {key.strip().lower(): value for key, value in answer.items()}
    given = {key: _listed(known.get(key)) for key in ("normal", "defects")}
    defects = [defect for defect in map(_read_defect, given["defects"]) if defect["name"]]
    bare = [defect["name"] for defect in defects if not defect["look"]]
    if bare:
        raise ValueError(f'these defects have only a name, and each needs a "look": {", ".join(bare)[:500]}')
    counted: dict[str, dict[str, Any]] = {
        "normal": {_fold(text): text for text in map(_as_text, given["normal"]) if text},
        "defects": {_fold(defect["look"]): defect for defect in defects},
    }
    fields = {key: list(items.values()) for key, items in counted.items()}
    try:
        return ClassDescription.model_validate({"domain": _as_text(known.get("domain")).lower(), **fields})
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))} {fault['msg']}" for fault in error.errors()[:5]]
        if any(len(given[key]) > len(fields[key]) for key in given):
            faults.append("items that repeat another or are not text do not count")
        raise ValueError("; ".join(faults)) from None


def _listed(value: object) -> list[Any]:
    """Returns the items of a list; an object of names and looks becomes a list of defects."""
    if isinstance(value, dict):
        return [{"name": name, "look": look} for name, look in value.items()]
    return value if isinstance(value, list) else []


def _read_defect(item: object) -> dict[str, str]:
    """Reads name and look of a defect; either is empty if it is missing."""
    if isinstance(item, str):
        name, _, look = item.partition(": ")
        item = {"name": name, "look": look}
    known = {key.strip().lower(): value for key, value in item.items()} if isinstance(item, dict) else {}
    return {key: _as_text(known.get(key)) for key in ("name", "look")}


def _as_text(value: object) -> str:
    return one_line(value) if isinstance(value, str) else ""


def _fold(text: str) -> str:
    return text.casefold().rstrip(".")
