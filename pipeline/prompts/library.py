"""The prompt library: one object a class and recipe in the store, written once, by whoever was first.

Exactly once per class lives here, in the store, because actors restart and tonight's job is not last night's.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import logging
from datetime import datetime, timezone
from importlib.abc import Traversable

from pydantic import ValidationError

from pipeline.prompts import llm
from pipeline.storage import Store, leases, safe_segment
from schemas.job import Prompts
from schemas.prompts import ClassDescription, PromptSet

logger = logging.getLogger(__name__)


class PromptLibraryError(RuntimeError):
    """A stored prompt set cannot be used; the message names the object and the fault."""


def recipe(config: Prompts, class_name: str) -> str:
    """Fingerprint (12 hex digits) of what is asked of whom; another LLM or another instruction is another recipe."""
    if config.asks_llm:
        facts: list[object] = ["llm", config.llm, config.temperature, llm.INSTRUCTION_VERSION]
    elif config.described and (bundled := bundled_description(class_name)) is not None:
        facts = ["bundled", bundled.model_dump(mode="json")]
    else:
        facts = ["base"]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def set_key(class_name: str, fingerprint: str) -> str:
    """Where a prompt set lies in the output."""
    return f"prompts/{safe_segment(class_name)}/{fingerprint}.json"


def find(store: Store, class_name: str, config: Prompts) -> PromptSet | None:
    """The stored prompt set, edits included; None where there is none yet.

    Raises PromptLibraryError where the object is no valid prompt set: an edit that went wrong is never papered over by
    another call.
    """
    key = set_key(class_name, recipe(config, class_name))
    try:
        text = store.read(key)
    except FileNotFoundError:
        return None
    try:
        return PromptSet.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"]) or "the whole"
        raise PromptLibraryError(
            f"{store.uri(key)} is no valid prompt set: {where}: {first['msg']}; mend the edit, or delete the object to "
            f"have it made anew"
        ) from None


def find_or_make(store: Store, class_name: str, config: Prompts) -> PromptSet | None:
    """The prompt set that obtain would give without asking an LLM; None where it would ask. Writes nothing."""
    stored = find(store, class_name, config)
    if stored is not None or config.asks_llm:
        return stored
    return make_offline(class_name, described=config.described)


def obtain(store: Store, class_name: str, config: Prompts, *, owner: str, lease_s: float = leases.LEASE_S) -> PromptSet:
    """The prompt set of a class, made now if there is none: an LLM is asked only by the holder of the lease.

    owner: who is asking, for the lease; lease_s: how long the lease outlives it, in seconds. Raises llm.LLMError where
    the LLM fails and config.on_failure is `fail`; with `base` the set has source base and is not stored, so that the
    next job asks again.
    """
    stored = find(store, class_name, config)
    if stored is not None:
        return stored
    fingerprint = recipe(config, class_name)
    key = set_key(class_name, fingerprint)
    if not config.asks_llm:
        return _store_set(store, key, make_offline(class_name, described=config.described), config)
    try:
        return _ask(store, key, class_name, config, fingerprint, owner, lease_s)
    except llm.LLMError as error:
        if config.on_failure == "fail":
            raise
        logger.error("%s; going on with the base ensemble for class %r", error, class_name)
        return _new_set(class_name, fingerprint, source="base", description=None)


def make_offline(class_name: str, *, described: bool = True) -> PromptSet:
    """Makes the prompt set of a class without an LLM: of its bundled description, else of the base ensemble alone.

    described: False takes the base ensemble alone in any case.
    """
    description = bundled_description(class_name) if described else None
    source = "base" if description is None else "bundled"
    fingerprint = recipe(Prompts(described=described), class_name)
    return _new_set(class_name, fingerprint, source=source, description=description)


def bundled_description(class_name: str) -> ClassDescription | None:
    """What the bundled pack says of a class (MVTec AD and VisA), by its name in any case, `-`, `_` and space alike."""
    file = _bundled_files().get(class_name.lower().replace("-", "_").replace(" ", "_"))
    return None if file is None else ClassDescription.model_validate_json(file.read_bytes())


@functools.cache
def _bundled_files() -> dict[str, Traversable]:
    folder = importlib.resources.files("pipeline.prompts") / "bundled"
    return {file.name.removesuffix(".json"): file for file in folder.iterdir()}


def _ask(
    store: Store, key: str, class_name: str, config: Prompts, fingerprint: str, owner: str, lease_s: float
) -> PromptSet:
    name = key.removesuffix(".json")
    lease = leases.acquire(store, name, owner, lease_s, lambda: store.exists(key))
    if lease is None:
        logger.info("class %r: another job has asked the LLM", class_name)
        return _must_find(store, class_name, config)
    with lease.held(lease_s):
        description, usage = llm.describe_class(class_name, config, lease.check)
        made = _new_set(class_name, fingerprint, source="llm", description=description).model_copy(
            update={"model": config.llm, "usage": usage}
        )
        made = _store_set(store, key, made, config)
    leases.clear(store, name)
    return made


def _new_set(class_name: str, fingerprint: str, *, source: str, description: ClassDescription | None) -> PromptSet:
    return PromptSet.model_validate(
        {
            "class_name": class_name,
            "source": source,
            "recipe": fingerprint,
            "description": description,
            "created_at": datetime.now(timezone.utc),
        }
    )


def _store_set(store: Store, key: str, made: PromptSet, config: Prompts) -> PromptSet:
    """Create-only: who comes second uses what the first has stored."""
    if store.create(key, made.model_dump_json(indent=2).encode()):
        return made
    return _must_find(store, made.class_name, config)


def _must_find(store: Store, class_name: str, config: Prompts) -> PromptSet:
    stored = find(store, class_name, config)
    if stored is None:
        key = set_key(class_name, recipe(config, class_name))
        raise PromptLibraryError(f"{store.uri(key)} was there a moment ago and is gone; run the job again")
    return stored
