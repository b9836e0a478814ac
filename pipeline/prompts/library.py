"""The prompt library: one stored prompt set per class and recipe, written once.

The store, not an actor, makes sure that an LLM is asked once per class, because actors restart and jobs end.
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
    """Returns the fingerprint (12 hex digits) of how the prompts of a class are made: LLM, temperature, instruction."""
    if config.asks_llm:
        facts: list[object] = ["llm", config.llm, config.temperature, llm.INSTRUCTION_VERSION]
    elif config.described and (bundled := bundled_description(class_name)) is not None:
        facts = ["bundled", bundled.model_dump(mode="json")]
    else:
        facts = ["base"]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def set_key(class_name: str, fingerprint: str) -> str:
    """Returns the key of a prompt set in the output. fingerprint: its recipe."""
    return f"prompts/{safe_segment(class_name)}/{fingerprint}.json"


def find(store: Store, class_name: str, config: Prompts) -> PromptSet | None:
    """Reads the stored prompt set with people's edits; None if there is none yet.

    Raises PromptLibraryError if the object is not a valid prompt set: a broken edit is reported and not replaced by
    another call of the LLM.
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
            f"{store.uri(key)} is not a valid prompt set: {where}: {first['msg']}; correct the edit, or delete the "
            f"object so that it is made anew"
        ) from None


def find_or_make(store: Store, class_name: str, config: Prompts) -> PromptSet | None:
    """Returns the prompt set that obtain would return without an LLM; None if it would ask one. Writes nothing."""
    stored = find(store, class_name, config)
    if stored is not None or config.asks_llm:
        return stored
    return make_offline(class_name, described=config.described)


def obtain(store: Store, class_name: str, config: Prompts, *, owner: str, lease_s: float = leases.LEASE_S) -> PromptSet:
    """Returns the prompt set of a class, and makes it if there is none. Only the holder of a lease asks the LLM.

    owner: name of this process, for the lease. lease_s: seconds until another process may ask if this one dies. Raises
    llm.LLMError if the LLM fails and config.on_failure is `fail`. If it is `base`, the returned set has source base and
    is not stored, so that the next job asks again.
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
    """Makes the prompt set of a class without an LLM: from its bundled description if there is one, else without any.

    described: False ignores the bundled description, so that only the base ensemble is used.
    """
    description = bundled_description(class_name) if described else None
    source = "base" if description is None else "bundled"
    fingerprint = recipe(Prompts(described=described), class_name)
    return _new_set(class_name, fingerprint, source=source, description=description)


def bundled_description(class_name: str) -> ClassDescription | None:
    """Returns the bundled description of a class of MVTec AD or VisA, else None.

    Case, `-`, `_` and space do not count.
    """
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
    """Stores the set create-only. Returns it, or the set that another process has stored before."""
    if store.create(key, made.model_dump_json(indent=2).encode()):
        return made
    return _must_find(store, made.class_name, config)


def _must_find(store: Store, class_name: str, config: Prompts) -> PromptSet:
    stored = find(store, class_name, config)
    if stored is None:
        key = set_key(class_name, recipe(config, class_name))
        raise PromptLibraryError(f"{store.uri(key)} was deleted while the job was reading it; run the job again")
    return stored
