"""The local stack of infra/local, exactly as its page says."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.places import ROOT

PAGE = ROOT / "infra" / "local" / "README.md"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_lines_of_the_page_live_two_nights_on_it() -> None:
    """Started, a night submitted, its driver killed, the night resumed, a second one, diff, DuckDB, stopped."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL))
    assert not (ROOT / "out" / "local").exists(), "stop the local stack that runs: make local-down"
    try:
        done = subprocess.run(["bash", "-euxo", "pipefail", "-c", lines], cwd=ROOT, capture_output=True, text=True)
    finally:
        subprocess.run(["make", "local-down"], cwd=ROOT, check=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "submitted as alfa-2026-01-01" in done.stderr and "-2" in done.stderr
    assert "shards are finished already" in done.stdout
    for night in ("2026-01-01", "2026-01-02"):
        for class_name in ("capsules", "hazelnut"):
            assert re.search(rf"{night} │ {class_name} +│ +12 │", done.stdout), done.stdout
    assert not (ROOT / "out" / "local").exists()
