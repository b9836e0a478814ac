"""Tests that the dashboard only uses existing metrics: those of scoring actors, and those of Ray's own dashboards."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path

import ray

from pipeline.engine import ScoringActor
from tests.places import ROOT

DASHBOARD = json.loads((ROOT / "infra" / "grafana" / "night.json").read_text())


def metrics_of_actors() -> dict[str, set[str]]:
    """Names under which Prometheus finds the metrics of the scoring actors, with their labels."""
    found: dict[str, set[str]] = {}
    for call in ast.walk(ast.parse(Path(inspect.getfile(ScoringActor)).read_text())):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ("Counter", "Histogram"):
            name, _, *more = map(ast.literal_eval, call.args)
            if call.func.id == "Counter":
                found[f"ray_{name}_total"] = set(more[0])
            else:
                found |= {f"ray_{name}_{part}": {"le"} for part in ("bucket", "count", "sum")}
    return found


def metrics_of_ray() -> str:
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    return "".join(path.read_text() for path in folder.glob("*.py"))


def test_each_panel_shows_a_metric_that_exists() -> None:
    ours, rays = metrics_of_actors(), metrics_of_ray()
    assert "ray_alfa_images_total" in ours
    asked = [variable["query"] for variable in DASHBOARD["templating"]["list"]]
    for panel in DASHBOARD["panels"]:
        asked += [target["expr"] for target in panel["targets"]]
        assert panel["targets"] and panel["title"]
    for expression in asked:
        for name in re.findall(r"\b(?:ray|autoscaler)_\w+", expression):
            assert name in ours or (not name.startswith("ray_alfa_") and f"{name}{{" in rays), name
        for label in re.findall(r"sum by \((\w+)\) \(rate\((ray_alfa_\w+)", expression):
            assert label[0] in ours[label[1]]


def test_panels_lie_beside_each_other() -> None:
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
