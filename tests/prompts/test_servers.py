"""Tests servers and models as people use them: some refuse options of a request, or answer in another form."""

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from pipeline.prompts import LLMError, llm
from pipeline.prompts.answers import read_description
from schemas.job import Prompts
from schemas.prompts import ClassDescription
from tests.llm_server import ANSWER, LLMServer, Reply, chat

Refusal = Callable[[dict[str, Any]], Reply | None]
TEXT = json.dumps(ANSWER)


@pytest.fixture(autouse=True)
def with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-secret-77f1")


def config(server: LLMServer, **options: object) -> Prompts:
    return Prompts.model_validate({"llm": "openai/test", "api_base": server.api_base, **options})


def error(message: str, status: int = 400) -> Reply:
    return status, {}, json.dumps({"error": {"message": message, "type": "invalid_request_error", "code": "x"}})


def form_of(request: dict[str, Any]) -> str:
    return str(request.get("response_format", {}).get("type", "text"))


def reasoning(request: dict[str, Any]) -> Reply | None:
    """As OpenAI's models that think."""
    if "temperature" in request:
        return error("Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) is.")
    return None


def older_vllm(request: dict[str, Any]) -> Reply | None:
    """As FastAPI says what is no value of an enumeration."""
    if form_of(request) == "json_schema":
        fault = {"loc": ["body", "response_format", "type"], "msg": "Input should be 'text' or 'json_object'"}
        return 422, {}, json.dumps({"detail": [fault]})
    return None


def text_alone(request: dict[str, Any]) -> Reply | None:
    return error(f"response_format {form_of(request)} is not supported", 422) if form_of(request) != "text" else None


def terse(request: dict[str, Any]) -> Reply | None:
    """One that does not say what it refuses."""
    return (422, {}, "Unprocessable Entity") if form_of(request) != "text" else None


def everything(request: dict[str, Any]) -> Reply | None:
    return reasoning(request) or text_alone(request)


@pytest.mark.parametrize("model", ["openai/test", "hosted_vllm/test"])
@pytest.mark.parametrize(
    ("refuse", "forms", "temperatures"),
    [
        (lambda _: None, ["json_schema"], [0.0]),
        (reasoning, ["json_schema"] * 2, [0.0, None]),
        (older_vllm, ["json_schema", "json_object"], [0.0, 0.0]),
        (text_alone, ["json_schema", "json_object", "text"], [0.0, 0.0, 0.0]),
        (terse, ["json_schema", "text"], [0.0, None]),
        (everything, ["json_schema", "json_schema", "json_object", "text"], [0.0, None, None, None]),
    ],
)
def test_what_a_server_refuses_is_left_out(
    model: str, refuse: Refusal, forms: list[str], temperatures: list[float | None]
) -> None:
    with LLMServer(refuse=refuse) as server:
        description, usage = llm.describe_class("nut", config(server, llm=model))
    requests = [json.loads(body) for body in server.bodies]
    assert [form_of(request) for request in requests] == forms
    assert [request.get("temperature") for request in requests] == temperatures
    assert len(description.defects) == 6
    assert usage.calls == len(forms)


def test_lm_studio_takes_the_schema_and_no_json_object() -> None:
    def refuse(request: dict[str, Any]) -> Reply | None:
        refused = (400, {}, json.dumps({"error": "'response_format.type' must be 'json_schema' or 'text'"}))
        return refused if form_of(request) == "json_object" else None

    with LLMServer(refuse=refuse) as server:
        assert llm.describe_class("nut", config(server, llm="lm_studio/test"))[1].calls == 1
    asked = json.loads(server.bodies[0])["response_format"]["json_schema"]
    assert asked["strict"] is True
    jsonschema.validate(ANSWER, asked["schema"])
    assert list(asked["schema"]["properties"]) == list(ClassDescription.model_fields)


def test_what_was_refused_once_is_not_sent_again_in_the_repair_round() -> None:
    with LLMServer([chat("no")], refuse=reasoning) as server:
        assert llm.describe_class("nut", config(server))[1].calls == 3
    assert [json.loads(body).get("temperature") for body in server.bodies] == [0.0, None, None]


@pytest.mark.parametrize(("attempts", "calls"), [(1, 1), (3, 3), (9, 4)])
def test_refusals_are_bounded_and_the_last_one_is_told(attempts: int, calls: int) -> None:
    def refuse(request: dict[str, Any]) -> Reply | None:
        return everything(request) or error("no such model: test")

    with LLMServer(refuse=refuse) as server, pytest.raises(LLMError) as caught:
        llm.describe_class("nut", config(server, max_attempts=attempts))
    assert server.requests["nut"] == calls
    last = {1: "raise prompts.max_attempts", 3: "json_object is not supported", 9: "no such model: test"}
    assert last[attempts] in str(caught.value)


def test_an_answer_that_is_cut_is_asked_for_with_more_tokens(caplog: pytest.LogCaptureFixture) -> None:
    with LLMServer([chat(TEXT[:300], "length")]) as server:
        description, usage = llm.describe_class("nut", config(server))
    assert len(description.defects) == 6
    assert (usage.calls, usage.completion_tokens) == (2, 100)
    assert [json.loads(body).get("max_tokens") for body in server.bodies] == [None, 8192]
    assert "the token limit cut the answer; asking again with temperature 0.0, form json_schema, max_tokens 8192" in (
        caplog.text
    )


def test_an_answer_that_is_always_cut_is_an_error_that_says_so() -> None:
    fault = "the token limit cut it, even at 8192 tokens"
    with LLMServer([chat(TEXT[:300], "length")] * 9) as server, pytest.raises(LLMError, match=fault):
        llm.describe_class("nut", config(server))
    assert server.requests["nut"] == 3


def test_a_server_that_refuses_more_tokens_is_asked_without() -> None:
    def refuse(request: dict[str, Any]) -> Reply | None:
        return error("max_tokens is too large: 8192 > 4096") if "max_tokens" in request else None

    with LLMServer([chat(TEXT[:300], "length")], refuse=refuse) as server:
        assert llm.describe_class("nut", config(server))[1].calls == 3


@pytest.mark.parametrize(
    "reply",
    [
        chat(None, reasoning_content=TEXT),
        chat("", reasoning_content=f"I think of a nut. {TEXT}"),
        chat(f"<think>Maybe {TEXT.replace('object', 'texture')}? No: {{}}</think>\n{TEXT}"),
    ],
)
def test_an_answer_among_a_models_thoughts_is_found(reply: Reply) -> None:
    with LLMServer([reply]) as server:
        description, usage = llm.describe_class("nut", config(server))
    assert (description.domain, len(description.normal), usage.calls) == ("object", 6, 1)


def test_a_model_that_answers_nothing_is_told_so() -> None:
    with LLMServer([chat(None)] * 2) as server, pytest.raises(LLMError, match="no JSON object in the answer"):
        llm.describe_class("nut", config(server))


NORMAL, DEFECTS = ANSWER["normal"], ANSWER["defects"]


@pytest.mark.parametrize(
    "answer",
    [
        f'```json\n{TEXT}\n```\nReplace {{class}} by {{"name": "nut"}} as needed.',
        f"For {{class}}:\n{TEXT}",
        json.dumps({"answer": ANSWER}),
        json.dumps([ANSWER]),
        json.dumps({**ANSWER, "domain": " Object "}),
        json.dumps({"Domain": "OBJECT", "Normal": NORMAL, "DEFECTS": DEFECTS, "confidence": 0.9}),
        json.dumps({**ANSWER, "normal": [*NORMAL, 7, None, {"a": 1}, "", NORMAL[0].upper() + "."]}),
        json.dumps({**ANSWER, "defects": [*DEFECTS, {**DEFECTS[0], "name": "another"}]}),
        json.dumps({**ANSWER, "defects": [{**defect, "severity": 3} for defect in DEFECTS]}),
        json.dumps({**ANSWER, "defects": {defect["name"]: defect["look"] for defect in DEFECTS}}),
        json.dumps({**ANSWER, "defects": [f"{defect['name']}: {defect['look']}" for defect in DEFECTS]}),
        TEXT.replace("number 0", "number\n0"),
    ],
)
def test_forms_that_mean_the_same_are_understood(answer: str) -> None:
    description = read_description(answer)
    assert description.domain == "object"
    assert sorted(text.lower().rstrip(".") for text in description.normal) == NORMAL
    assert [defect.look for defect in description.defects] == [defect["look"] for defect in DEFECTS]


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ({"defects": [DEFECTS[0]] * 6}, "defects .* not 1; items that repeat another"),
        ({"defects": [{**DEFECTS[0], "name": f"name {n}"} for n in range(6)]}, "defects .* not 1"),
        ({"normal": [NORMAL[0]] * 5 + NORMAL[1:4]}, "normal .* not 4; items that repeat another"),
        ({"normal": [*NORMAL[:4], 5, 6]}, "normal .* not 4; items .* not text"),
        ({"defects": ["crack", *DEFECTS]}, 'only a name, and each needs a "look": crack$'),
        ({"domain": "thing"}, "domain "),
    ],
)
def test_what_lacks_substance_is_not_accepted(answer: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        read_description(json.dumps({**ANSWER, **answer}))


def test_an_answer_without_choices_is_an_empty_one() -> None:
    """Gemini's and Azure's filters take the whole answer away, with status 200."""
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "test", "choices": []}
    with LLMServer([(200, {}, json.dumps(body))]) as server:
        assert llm.describe_class("nut", config(server))[1].calls == 2
    with LLMServer([(200, {}, json.dumps(body))] * 2) as server, pytest.raises(LLMError, match="no valid description"):
        llm.describe_class("nut", config(server))


def test_broken_json_is_told_where_it_breaks() -> None:
    with pytest.raises(ValueError, match="Expecting ',' delimiter at character 59 of the object"):
        read_description("Here: " + TEXT.replace('0", "', '0" "', 1))


def test_defects_that_are_names_are_asked_once_for_their_looks() -> None:
    names = [defect["name"] for defect in DEFECTS]
    bare = chat(json.dumps({**ANSWER, "defects": names}))
    with LLMServer([bare]) as server:
        description, usage = llm.describe_class("nut", config(server))
    assert [defect.name for defect in description.defects] == names
    assert usage.calls == 2
    complaint = json.loads(server.bodies[1])["messages"][-1]["content"]
    assert f'each needs a "look": {", ".join(names)}' in complaint
    with LLMServer([bare, bare]) as server, pytest.raises(LLMError, match="have only a name"):
        llm.describe_class("nut", config(server))
