"""The base ensemble, which every class gets: all states in all templates (states as in WinCLIP and AnoVL)."""

from __future__ import annotations

from schemas.prompts import Prompt

NORMAL_STATES = (
    "{}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
)
ANOMALOUS_STATES = (
    "damaged {}",
    "broken {}",
    "defective {}",
    "imperfect {}",
    "{} with flaw",
    "{} with defect",
    "{} with damage",
)
TEMPLATES = (
    "a photo of a {}",
    "a close-up photo of a {}",
    "a cropped photo of the {}",
    "a cropped industrial image of the {}",
    "a bright photo of a {}",
    "a photo of the {} for visual inspection",
)


def base_prompts(noun: str) -> tuple[Prompt, ...]:
    """Puts every state into every template, for a noun such as `metal nut`; normal prompts come first."""
    return tuple(
        Prompt(text=template.replace("{}", state.replace("{}", noun)), side=side, source="base")
        for side, states in (("normal", NORMAL_STATES), ("anomalous", ANOMALOUS_STATES))
        for state in states
        for template in TEMPLATES
    )
