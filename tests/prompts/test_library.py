import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.prompts import LLMError, PromptLibraryError, compose_ensemble, find, llm, obtain
from pipeline.prompts.library import recipe, set_key
from pipeline.storage import Store, leases
from schemas.job import Prompts
from tests.llm_server import LLMServer, chat

CLASSES = [f"class {number}" for number in range(5)]


@pytest.fixture(autouse=True)
def quick_and_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setattr(llm, "FIRST_PAUSE_S", 0.01)


def config(server: LLMServer, **options: object) -> Prompts:
    return Prompts.model_validate({"llm": "openai/test", "api_base": server.api_base, **options})


def test_a_class_is_asked_for_once_ever(tmp_path: Path) -> None:
    with LLMServer() as server:
        first = obtain(Store(str(tmp_path)), "nut", config(server), owner="a")
        second = obtain(Store(str(tmp_path)), "nut", config(server), owner="b")
    assert first == second and first.source == "llm" and first.model == "openai/test"
    assert server.requests == {"nut": 1}


@pytest.mark.parametrize("name", ["hazelnut", "gearbox"])
def test_undescribed_asks_nobody_and_uses_the_base_ensemble(name: str, tmp_path: Path) -> None:
    with LLMServer() as server:
        asked = obtain(Store(str(tmp_path)), name, config(server), owner="a")
        base = obtain(Store(str(tmp_path)), name, config(server, described=False), owner="a")
        bundled = obtain(Store(str(tmp_path)), name, Prompts(described=False), owner="a")
    assert server.requests == {name: 1} and asked.source == "llm"
    assert base == bundled and (base.source, base.description) == ("base", None)


def test_eight_callers_and_five_classes_make_five_calls(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def ask_all(number: int) -> None:
        store = Store(str(tmp_path))
        barrier.wait()
        for place in range(5):
            obtain(store, CLASSES[(place + number) % 5], config(server), owner=f"caller {number}")

    with LLMServer() as server, ThreadPoolExecutor(8) as pool:
        list(pool.map(ask_all, range(8)))
    assert server.requests == dict.fromkeys(CLASSES, 1)
    left = sorted(info.key for info in Store(str(tmp_path)).list())
    assert left == sorted(set_key(name, recipe(config(server), name)) for name in CLASSES)


def lease_of(store: Store, prompts: Prompts, number: int) -> str:
    return leases.lease_key(set_key("nut", recipe(prompts, "nut")).removesuffix(".json"), number)


def plant_lease(store: Store, prompts: Prompts, seconds: float) -> None:
    lease = {"owner": "somebody who died", "expires_at": time.time() + seconds}
    store.write(lease_of(store, prompts, 1), json.dumps(lease).encode())


def test_the_lease_of_a_dead_holder_is_taken_over_by_one(tmp_path: Path) -> None:
    with LLMServer() as server, ThreadPoolExecutor(4) as pool:
        plant_lease(Store(str(tmp_path)), config(server), -1.0)
        list(pool.map(lambda n: obtain(Store(str(tmp_path)), "nut", config(server), owner=str(n)), range(4)))
    assert server.requests == {"nut": 1}


def test_a_living_lease_is_waited_for(tmp_path: Path) -> None:
    store, waiting = Store(str(tmp_path)), threading.Event()
    with LLMServer() as server, ThreadPoolExecutor(1) as pool:
        plant_lease(store, config(server), 600.0)
        name = lease_of(store, config(server), 1).rpartition(".claim-")[0]
        done = threading.Event()

        def pause(_: float) -> None:
            waiting.set()
            done.wait(30)

        waiter = pool.submit(leases.acquire, store, name, "b", 60.0, done.is_set, pause=pause)
        assert waiting.wait(30) and not waiter.done()
        done.set()
        assert waiter.result(30) is None
    assert server.requests == {}


def test_a_failed_holder_lets_the_next_one_in_at_once(tmp_path: Path) -> None:
    with LLMServer([chat("no"), chat("no")]) as server:
        with pytest.raises(LLMError):
            obtain(Store(str(tmp_path)), "nut", config(server), owner="a")
        assert obtain(Store(str(tmp_path)), "nut", config(server), owner="b").source == "llm"
    assert server.requests == {"nut": 3}


def test_a_failure_may_fall_back_to_the_base_ensemble_for_this_job_alone(tmp_path: Path) -> None:
    with LLMServer([chat("no"), chat("no")]) as server:
        prompts = config(server, on_failure="base")
        assert obtain(Store(str(tmp_path)), "nut", prompts, owner="a").source == "base"
        assert obtain(Store(str(tmp_path)), "nut", prompts, owner="a").source == "llm"


def test_an_edit_is_used_and_changes_the_fingerprint(tmp_path: Path) -> None:
    store, prompts = Store(str(tmp_path)), Prompts()
    before = obtain(store, "hazelnut", prompts, owner="a")
    key = set_key("hazelnut", recipe(prompts, "hazelnut"))
    edited = json.loads(store.read(key))
    edited["description"]["defects"][0] = {"name": "worm", "look": "a white worm on the shell"}
    store.write(key, json.dumps(edited).encode())
    after = obtain(store, "hazelnut", prompts, owner="a")
    ensembles = [compose_ensemble(item, lambda _: True) for item in (before, after)]
    assert any(prompt.defect == "worm" for prompt in ensembles[1].prompts)
    assert ensembles[0].fingerprint != ensembles[1].fingerprint


def test_a_broken_edit_is_said_and_never_asked_for_again(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with LLMServer() as server:
        obtain(store, "nut", config(server), owner="a")
        key = set_key("nut", recipe(config(server), "nut"))
        store.write(key, store.read(key).replace(b'"domain": "object"', b'"domain": "thing"'))
        with pytest.raises(PromptLibraryError, match=r"description\.domain") as caught:
            obtain(store, "nut", config(server), owner="a")
    assert store.uri(key) in str(caught.value) and server.requests["nut"] == 1


def test_without_an_llm_known_classes_are_bundled_and_others_base(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert find(store, "Hazelnut", Prompts()) is None
    assert obtain(store, "Hazelnut", Prompts(), owner="a").source == "bundled"
    assert obtain(store, "gear box", Prompts(), owner="a").source == "base"
    assert find(store, "gear box", Prompts()) == obtain(store, "gear box", Prompts(), owner="a")


def test_another_llm_is_another_recipe_and_patience_is_not() -> None:
    base = Prompts(llm="openai/a")
    assert recipe(base, "nut") != recipe(Prompts(llm="openai/b"), "nut")
    assert recipe(base, "nut") == recipe(Prompts(llm="openai/a", timeout_s=5, api_base="http://x/v1"), "nut")
