import datetime

from pipeline.prompts import compose_ensemble
from pipeline.prompts.base import ANOMALOUS_STATES, NORMAL_STATES, TEMPLATES
from pipeline.prompts.compose import display_name
from schemas.prompts import ClassDescription, Defect, PromptEnsemble, PromptSet


def compose(*looks: str, class_name: str = "metal_nut", words: int = 100) -> PromptEnsemble:
    description = ClassDescription(
        domain="object",
        normal=tuple(f"an even surface {number}" for number in range(5)),
        defects=tuple(Defect(name=f"defect {number}", look=look) for number, look in enumerate(looks)),
    )
    prompt_set = PromptSet(
        class_name=class_name,
        source="llm",
        recipe="r",
        description=description,
        created_at=datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
    )
    return compose_ensemble(prompt_set, lambda text: len(text.split()) <= words)


LOOKS = ("a crack", "a dent", "a hole", "a stain", "a scratch")


def test_base_and_described_prompts_on_both_sides() -> None:
    prompts = compose(*LOOKS).prompts
    normal = [prompt for prompt in prompts if prompt.side == "normal"]
    anomalous = [prompt for prompt in prompts if prompt.side == "anomalous"]
    assert len(normal) == len(NORMAL_STATES) * len(TEMPLATES) + 5
    assert len(anomalous) == len(ANOMALOUS_STATES) * len(TEMPLATES) + 5
    assert "a close-up photo of a flawless metal nut" in [prompt.text for prompt in normal]
    last = anomalous[-1]
    assert (last.text, last.source) == ("an object image of a damaged metal nut with a scratch", "llm")
    assert (last.defect, anomalous[0].defect, anomalous[0].source) == ("defect 4", None, "base")


def test_long_prompts_are_cut_at_a_sentence_then_a_comma_then_a_word() -> None:
    sentence = "a crack. It runs on and on over the whole of it"
    comma = "a long crack, which runs on and on over the whole of it"
    word = "a crack that runs on and on over the whole of it"
    texts = [prompt.text for prompt in compose(sentence, comma, word, "a hole", "a dent", words=12).prompts]
    start = "an object image of a damaged metal nut with"
    assert f"{start} a crack." in texts and f"{start} a long crack" in texts
    assert f"{start} a crack that" in texts


def test_repeated_texts_appear_once_and_the_fingerprint_follows_the_texts() -> None:
    once, twice = compose(*LOOKS), compose(*LOOKS, "a dent")
    assert len(once.prompts) == len(twice.prompts)
    assert once.fingerprint == twice.fingerprint == compose(*LOOKS).fingerprint
    assert compose(*LOOKS[:-1], "a burr").fingerprint != once.fingerprint


def test_class_names_become_words() -> None:
    assert display_name("metal_nut") == "metal nut"
    assert display_name("pcb1") == "pcb"
    assert display_name("a\n\x00b\t c") == "a b c"
    assert display_name("123") == "123"
    assert display_name("\n") == "object"
    assert len(display_name("x" * 500)) == 60
