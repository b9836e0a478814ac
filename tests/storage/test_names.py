from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.storage import safe_segment
from pipeline.storage.names import safe_path

NAMES = st.text(alphabet=st.sampled_from("aA%2Ee._-/\\ \n\0ü漢~") | st.characters(), max_size=40)


@given(NAMES, NAMES)
@example("a b", "a%20b")
@example("../x", "%2E./x")
@example("", "%")
@example("x" * 500, "x" * 501)
def test_different_names_give_different_paths(first: str, second: str) -> None:
    if first != second:
        assert safe_segment(first) != safe_segment(second)
        assert safe_path(first) != safe_path(second)


@given(st.one_of(NAMES, st.text(min_size=300, max_size=3000)))
@example("../../etc/passwd")
@example("/absolute")
@example("a//b")
@example("%2e%2e/x")
def test_a_path_stays_in_its_folder_and_is_short(name: str) -> None:
    path = safe_path(name)
    assert not path.startswith("/") and path.isascii() and path.isprintable()
    for part in path.split("/"):
        assert part and not part.startswith(".") and len(part) <= 240 and "\\" not in part
    assert "/" not in safe_segment(name)


def test_plain_names_stay_as_they_are() -> None:
    assert safe_path("hazelnut/test/good/000.png") == "hazelnut/test/good/000.png"


def test_a_folder_never_stands_where_a_mask_lies() -> None:
    assert safe_path("a.png/b").split("/")[0] != safe_path("a") + ".png"
