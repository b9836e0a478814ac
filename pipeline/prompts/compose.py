"""Composes the sentences that CLIP reads from a prompt set."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence

from pipeline.prompts.base import base_prompts
from schemas.prompts import Prompt, PromptEnsemble, PromptSet, RunPrompts, UsedPrompts

_LONGEST_NOUN = 60
_BOUNDARIES = (r"(?<=[.;!?])\s+", r",\s+", r"\s+")


def display_name(class_name: str) -> str:
    """Turns a class name into a noun of at most 60 characters: `metal_nut` -> `metal nut`, `pcb1` -> `pcb`."""
    words = "".join(char if char.isprintable() else " " for char in class_name).replace("_", " ").split()
    noun = " ".join(words)[:_LONGEST_NOUN].strip()
    return re.sub(r"(?<=[^\W\d])\d+$", "", noun) or noun or "object"


def compose_ensemble(prompt_set: PromptSet, fits: Callable[[str], bool]) -> PromptEnsemble:
    """Composes the base ensemble and the described details: "a(n) {domain} image of a {state} {class} with {detail}".

    fits: whether CLIP's tokenizer reads the whole text. Longer texts are cut at a sentence, else at a comma, else at a
    word. Each text appears once per side.
    """
    noun = display_name(prompt_set.class_name)
    prompts: dict[tuple[str, str], Prompt] = {}
    for prompt in (*base_prompts(noun), *_described(prompt_set, noun)):
        text = _shorten(prompt.text, fits)
        prompts.setdefault((prompt.side, text), prompt.model_copy(update={"text": text}))
    ordered = tuple(prompts.values())
    facts = [[prompt.text, prompt.side, prompt.defect] for prompt in ordered]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return PromptEnsemble(
        class_name=prompt_set.class_name, source=prompt_set.source, fingerprint=fingerprint, prompts=ordered
    )


def record_prompts(sets: Sequence[PromptSet], ensembles: Sequence[PromptEnsemble]) -> RunPrompts:
    """Records the prompts of a run: for each class its ensemble, and where that came from."""
    return RunPrompts(
        classes=tuple(
            UsedPrompts(
                ensemble=ensemble,
                recipe=prompt_set.recipe,
                model=prompt_set.model,
                usage=prompt_set.usage,
                created_at=prompt_set.created_at,
            )
            for prompt_set, ensemble in zip(sets, ensembles, strict=True)
        )
    )


def _described(prompt_set: PromptSet, noun: str) -> Iterator[Prompt]:
    description, source = prompt_set.description, prompt_set.source
    if description is None:
        return
    article = "an" if description.domain == "object" else "a"
    start = f"{article} {description.domain} image of a"
    for phrase in description.normal:
        yield Prompt(text=f"{start} flawless {noun} with {_clean(phrase)}", side="normal", source=source)
    for defect in description.defects:
        text = f"{start} damaged {noun} with {_clean(defect.look)}"
        yield Prompt(text=text, side="anomalous", source=source, defect=_clean(defect.name))


def _clean(phrase: str) -> str:
    return " ".join(phrase.split()).rstrip(".")


def _shorten(text: str, fits: Callable[[str], bool]) -> str:
    for boundary in _BOUNDARIES:
        if fits(text):
            return text
        starts = [match.start() for match in re.finditer(boundary, text)]
        cut = next((text[:end] for end in reversed(starts) if fits(text[:end])), None)
        if cut is not None:
            return cut
    while not fits(text):
        text = text[:-1]
    return text
