"""Tests which rooms may import which others. pipeline/README.md describes the rooms."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.places import ROOT

ROOMS = {
    "storage": set[str](),
    "tiling": set[str](),
    "images": {"storage", "tiling"},
    "prompts": {"storage"},
    "alfa": {"tiling"},
    "scoring": {"storage", "tiling", "images", "prompts", "alfa"},
    "lake": {"storage", "images"},
    "evaluation": {"storage", "images", "alfa", "scoring", "lake"},
    "report": {"storage", "images", "lake"},
    "engine": {"storage", "images", "prompts", "alfa", "scoring"},
}
"""Each room, and the rooms below it that it may import."""
ONLY_IN = {
    "ray": ("pipeline/engine/", "jobs/"),
    "litellm": ("pipeline/prompts/llm.py",),
    "torch": (
        "pipeline/alfa/",
        "pipeline/scoring/",
        "pipeline/evaluation/",
        "pipeline/engine/",
        "pipeline/images/resizing.py",
        "jobs/",
    ),
}
"""Packages that are imported in these places alone."""


def imports_of(source: str) -> Iterator[tuple[str, str]]:
    """Module and name of each import, also of those inside functions; the name is empty in `import a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def faults(path: str, source: str) -> list[str]:
    """What the imports of a file do against the plan; path: from the root of the project, with slashes."""
    area, room = path.split("/")[0], path.removesuffix(".py").split("/")[1]
    found = []
    for module, name in imports_of(source):
        top, *rest = module.split(".")
        if top in ONLY_IN and not path.startswith(ONLY_IN[top]):
            found.append(f"{path} imports {top}, which belongs in {' and '.join(ONLY_IN[top])}")
        if (area == "schemas" and top in ("pipeline", "jobs")) or (area == "pipeline" and top == "jobs"):
            found.append(f"{path} imports {module}, which lies above it")
            continue
        if top != "pipeline" or not (rest or name):
            continue
        other = rest[0] if rest else name
        if area == "pipeline" and other == room:
            continue
        if area == "pipeline" and other not in ROOMS.get(room, ()):
            found.append(f"{path} imports pipeline.{other}, which does not lie below pipeline.{room}")
        if len(rest) > 1:
            found.append(f"{path} imports {module}, inside of a room; use what pipeline.{other} offers")
        elif rest and name not in importlib.import_module(f"pipeline.{other}").__dict__.get("__all__", [name]):
            found.append(f"{path} imports {name}, which is not in __all__ of pipeline.{other}")
    return found


def test_imports_follow_the_plan() -> None:
    files = [path for area in ("schemas", "pipeline", "jobs") for path in (ROOT / area).rglob("*.py")]
    found = [
        fault
        for path in files
        if path.relative_to(ROOT).as_posix() != "pipeline/__init__.py"
        for fault in faults(path.relative_to(ROOT).as_posix(), path.read_text())
    ]
    assert len(files) > 80
    assert found == []


@pytest.mark.parametrize(
    ("path", "line", "said"),
    [
        ("pipeline/images/layouts.py", "from pipeline.alfa import Encoder", "does not lie below"),
        ("pipeline/alfa/encoder.py", "from pipeline.storage import Store", "does not lie below"),
        ("pipeline/lake/publish.py", "def f():\n    from pipeline.report import render", "does not lie below"),
        ("jobs/score.py", "from pipeline.scoring.shards import Shard", "inside of a room"),
        ("jobs/score.py", "from pipeline.storage import walk_local", "not in __all__"),
        ("schemas/job/config.py", "import pipeline.storage", "lies above it"),
        ("pipeline/storage/store.py", "import ray", "belongs in"),
        ("pipeline/lake/publish.py", "import torch", "belongs in"),
    ],
)
def test_a_planted_wrong_import_is_found(path: str, line: str, said: str) -> None:
    (fault,) = faults(path, line)
    assert said in fault


def test_no_test_imports_another() -> None:
    """What several tests use lies beside them, in a module without tests."""
    found = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in (ROOT / "tests").rglob("*.py")
        for module, _ in imports_of(path.read_text())
        if module.startswith("tests.") and module.rpartition(".")[2].startswith("test_")
    ]
    assert found == []


def test_each_room_says_what_it_offers() -> None:
    for room in sorted(ROOMS.keys() - {"tiling"}):
        module = importlib.import_module(f"pipeline.{room}")
        assert set(module.__all__) <= set(vars(module)), room
        said = module.__doc__ or ""
        assert all(word in said for word in ("In:", "Out:", "May import:")), room
        assert Path(module.__file__ or "").name == "__init__.py"
