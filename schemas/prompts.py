"""The LLM's description of a class, the prompt set that is stored of it, and the prompts that are made from it."""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from schemas.text import one_line


def _plain(text: object) -> object:
    return one_line(text) if isinstance(text, str) else text


Sentence = Annotated[str, BeforeValidator(_plain), Field(min_length=3, max_length=300)]


class Frozen(BaseModel):
    """Immutable; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Defect(Frozen):
    """One way in which a part of the class can be anomalous."""

    name: Annotated[str, BeforeValidator(_plain), Field(min_length=2, max_length=60)] = Field(
        description="short noun phrase, such as 'crack'"
    )
    look: Sentence = Field(description="how it looks on the part, as a phrase that can follow 'with'")


class ClassDescription(Frozen):
    """The answer of the LLM, and the part of a stored prompt set that people may edit."""

    domain: Literal["object", "texture"]
    normal: tuple[Sentence, ...] = Field(min_length=5, max_length=40, description="what a normal one looks like")
    defects: tuple[Defect, ...] = Field(min_length=5, max_length=40, description="the defects that it can have")


class Usage(Frozen):
    """What the LLM's answer cost. cost_usd is null where the provider's price is unknown."""

    calls: int = Field(0, ge=0, description="successful and failed requests, the repair round included")
    prompt_tokens: int = Field(0, ge=0)
    completion_tokens: int = Field(0, ge=0)
    cost_usd: float | None = Field(None, ge=0)


class PromptSet(Frozen):
    """The stored prompts of a class: prompts/<class>/<recipe>.json. It is written once, and people may edit it.

    `source` base has no description: only the base ensemble is used.
    """

    schema_version: Literal[1] = 1
    class_name: str = Field(min_length=1)
    source: Literal["llm", "bundled", "base"]
    recipe: str = Field(description="fingerprint of the question and the LLM; names the object")
    description: ClassDescription | None = None
    model: str | None = Field(None, description="litellm model string, where source is llm")
    usage: Usage = Usage()
    created_at: datetime.datetime


class Prompt(Frozen):
    """One sentence that an image is compared with."""

    text: str
    side: Literal["normal", "anomalous"]
    source: Literal["base", "llm", "bundled"]
    defect: str | None = Field(None, description="name of the defect, where the prompt describes one")


class PromptEnsemble(Frozen):
    """All normal and anomalous prompts of a class, in a fixed order. `fingerprint` hashes texts, sides and defects."""

    class_name: str
    source: Literal["llm", "bundled", "base"]
    fingerprint: str
    prompts: tuple[Prompt, ...]


class UsedPrompts(Frozen):
    """The prompts that the images of a class were compared with, and their origin. created_at is that of the set."""

    ensemble: PromptEnsemble
    recipe: str
    model: str | None
    usage: Usage
    created_at: datetime.datetime


class RunPrompts(Frozen):
    """The prompts of a run, runs/<run_id>/prompts.json: kept as they were, because stored sets may be edited later."""

    schema_version: Literal[1] = 1
    classes: tuple[UsedPrompts, ...]

    @property
    def ensembles(self) -> list[PromptEnsemble]:
        """The prompt ensemble of each class, in the order of `classes`."""
        return [used.ensemble for used in self.classes]
