"""The image, the DAG and the policy, as far as they can be tried without Docker, Airflow and AWS."""

from __future__ import annotations

import ast
import json
import re

from tests.places import ROOT

INFRA = ROOT / "infra"


def test_the_image_copies_what_is_there_and_does_not_run_as_root() -> None:
    lines = (INFRA / "docker" / "Dockerfile").read_text().splitlines()
    sources = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert {"jobs", "pipeline", "schemas", "pyproject.toml"} <= set(sources)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(sources) == allowed and all((ROOT / name).exists() for name in sources)
    (user,) = (line.split()[1] for line in lines if line.startswith("USER "))
    assert user == "1000"
    (version,) = re.findall(r"^ray==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for name in ("rayjob.yaml", "raycronjob.yaml"):
        assert f'rayVersion: "{version}"' in (INFRA / "kuberay" / name).read_text()


def test_the_dag_submits_its_night_and_gives_up_on_a_bad_job_alone() -> None:
    tree = ast.parse((INFRA / "airflow" / "alfa_nightly.py").read_text())
    (command,) = (
        ast.literal_eval(ast.List([item for item in node.value.elts if isinstance(item, ast.Constant)], ast.Load()))
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
    )
    assert command == ["alfa", "submit", "--address", "--run-date"]
    raised = [node.exc.func.id for node in ast.walk(tree) if isinstance(node, ast.Raise)]  # type: ignore[union-attr]
    assert raised == ["AirflowFailException", "AirflowException"]


def test_the_policy_allows_no_more_than_alfa_does() -> None:
    statements = json.loads((INFRA / "aws" / "policy.json").read_text())["Statement"]
    for statement in statements:
        actions, resources = (
            [part] if isinstance(part, str) else part for part in map(statement.get, ("Action", "Resource"))
        )
        assert all(re.fullmatch(r"s3:(List|Get|Put|Delete|Abort)\w+", action) for action in actions)
        assert all(re.fullmatch(r"arn:aws:s3:::[a-z]+(/[a-z]+/\*)?", resource) for resource in resources)
        if any(action.startswith(("s3:Put", "s3:Delete")) for action in actions):
            assert resources == ["arn:aws:s3:::lake/inspection/*"]
