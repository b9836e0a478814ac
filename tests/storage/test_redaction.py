import pytest

from pipeline.storage import redact


@pytest.mark.parametrize(
    ("text", "blanked"),
    [
        ("Incorrect API key provided: sk-abc123def456", "Incorrect API key provided: ***"),
        ("Authorization: Bearer eyJhbGciOi.J9", "Authorization: ***"),
        ("with AKIAIOSFODNN7EXAMPLE", "with ***"),
        ("a basic ensemble", "a basic ensemble"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: ***"),
        ("cannot read s3://key:pa/ss@lake/x.png", "cannot read s3://key:pa/ss@lake/x.png"),
        ("cannot read https://user:pass@host/x.png", "cannot read https://***@host/x.png"),
        ("GET /x?X-Amz-Signature=abc&X-Amz-Date=1", "GET /x?X-Amz-Signature=***&X-Amz-Date=1"),
        ("two\nlines\x1b[31m", "two lines[31m"),
        ("a mask of key-1 of the hazelnut", "a mask of key-1 of the hazelnut"),
    ],
)
def test_what_looks_like_a_secret_is_blanked_and_nothing_else(text: str, blanked: str) -> None:
    assert redact(text) == blanked


def test_values_of_secret_variables_are_blanked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTORY_DB_PASSWORD", "correct horse battery")
    monkeypatch.setenv("FACTORY_LINE", "line seven")
    assert redact("of line seven: correct horse battery") == "of line seven: ***"
