import re

import pytest

from pipeline.prompts.library import bundled_description

MVTEC = "bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush transistor wood zipper"
VISA = "candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 pipe_fryum"
TEXTURES = {"carpet", "grid", "leather", "tile", "wood"}


@pytest.mark.parametrize("name", [*MVTEC.split(), *VISA.split()])
def test_every_class_is_described_in_phrases_that_follow_with(name: str) -> None:
    description = bundled_description(name)
    assert description is not None
    assert description.domain == ("texture" if name in TEXTURES else "object")
    looks = [defect.look for defect in description.defects]
    phrases = [*description.normal, *looks]
    assert len(set(phrases)) == len(phrases)
    assert len({defect.name for defect in description.defects}) == len(looks)
    for phrase in phrases:
        assert re.match(r"[a-z0-9]", phrase) and not phrase.endswith(".") and 3 <= len(phrase.split()) <= 20


def test_names_are_found_in_any_spelling_and_nothing_else_is() -> None:
    assert bundled_description("Metal-Nut") == bundled_description("metal nut") == bundled_description("metal_nut")
    for name in ("gearbox", "", "../bundled/wood", "wood.json"):
        assert bundled_description(name) is None
