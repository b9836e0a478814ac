"""Tests the pages: the README is short and links all of them, and no link is broken."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.evaluation import PUBLISHED
from pipeline.evaluation.published import Published
from tests.places import ROOT

README = ROOT / "README.md"
PAGES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()
)  # fmt: skip


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def links_of(page: Path) -> Iterator[str]:
    """Targets of links and pictures, but those of other hosts."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors_of(page: Path) -> set[str]:
    """Names by which headings can be linked to, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in links_of(page):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{target} is not there"
        assert ROOT in found.parents, f"{target} lies outside of the repository"
        if anchor:
            assert anchor in anchors_of(found), f"{target}: {path or page.name} has no such heading"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in links_of(README)}
    assert len(PAGES) >= 10
    assert [page for page in PAGES if page not in linked | {README}] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[a](b.md#c) ![p](d/e.jpg)", ["b.md#c", "d/e.jpg"]),
        ("[a](https://example.org/x) `[a](b)`\n```\n[a](b)\n```\n[m](mailto:a@b)", []),
    ],
)
def test_links_are_those_of_the_text(text: str, found: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert list(links_of(page)) == found


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# The way: of a photo\n```\n# no heading\n```\n## 2. Few-shot, `x_y`\n")
    assert anchors_of(page) == {"the-way-of-a-photo", "2-few-shot-x_y"}


def test_code_cites_sections_that_the_method_has() -> None:
    headings = re.findall(r"^## (?:\d+\. )?(.+)$", (ROOT / "pipeline" / "alfa" / "README.md").read_text(), re.MULTILINE)
    cited = set()
    for area in ("schemas", "pipeline", "jobs"):
        for path in (ROOT / area).rglob("*.py"):
            for names in re.findall(r'alfa/README\.md,\s+((?:"[^"]+"(?:,| and)?\s*)+)', path.read_text()):
                cited |= set(re.findall(r'"([^"]+)"', names))
    assert {"Few-shot", "Fine-grained aligner"} <= cited <= set(headings)


def test_hooks_run_what_make_lint_runs() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    assert [hook["entry"] for hook in local["hooks"]] == commands


def test_published_figures_of_the_page_are_those_of_the_code() -> None:
    page = (ROOT / "pipeline" / "evaluation" / "README.md").read_text()
    section = page.partition("## Published by others\n")[2]
    shown = [line.strip("| ").split(" | ")[2:] for line in section.splitlines() if " / " in line and line[0] == "|"]

    def cell(row: Published) -> str:
        pro = "-" if row.pixel_pro is None else f"{row.pixel_pro:.1f}"
        return f"{row.image_auroc:.1f} / {row.pixel_auroc:.1f} / {pro}"

    rows = zip(PUBLISHED["mvtec"], PUBLISHED["visa"], strict=True)
    assert shown == [[cell(mvtec), cell(visa)] for mvtec, visa in rows]
