"""The image, the DAG, the policy and the clusters, as far as they can be tried without Docker, Airflow and a cloud."""

from __future__ import annotations

import ast
import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler import azure
from ray.autoscaler._private.util import prepare_config, validate_config

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
    for name in ("base/rayjob.yaml", "raycronjob.yaml"):
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


def cluster(cloud: str) -> Any:
    return yaml.safe_load((INFRA / cloud / "cluster.yaml").read_text())


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
def test_a_cluster_is_valid_by_rays_own_schema_and_grows_from_nothing(cloud: str) -> None:
    config = cluster(cloud)
    assert config["provider"]["type"] == cloud and config["provider"]["use_internal_ips"] is True
    validate_config(prepare_config(copy.deepcopy(config)))
    head, worker = (config["available_node_types"][name] for name in ("head", "gpu-spot"))
    assert head["resources"] == {"CPU": 0} and "labels" not in head
    assert worker["min_workers"] == 0 < worker["max_workers"] == config["max_workers"]
    assert worker["resources"]["GPU"] == 1 and worker["labels"] == {"ray.io/market-type": "spot"}
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in commands if "start" in command)
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]


def nodes(cloud: str) -> list[Any]:
    return [cluster(cloud)["available_node_types"][name]["node_config"] for name in ("head", "gpu-spot")]


def test_only_workers_are_spot_nodes_and_no_node_has_a_key() -> None:
    head, worker = nodes("aws")
    assert "InstanceMarketOptions" not in head and worker["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert head["IamInstanceProfile"] and worker["IamInstanceProfile"]

    head, worker = nodes("gcp")
    assert "scheduling" not in head and worker["scheduling"]["provisioningModel"] == "SPOT"
    accounts = [node["serviceAccounts"][0]["email"].partition("@")[0] for node in (head, worker)]
    assert accounts == ["alfa-head", "alfa-node"]
    assert not any("accessConfigs" in port for node in (head, worker) for port in node["networkInterfaces"])

    head, worker = (node["azure_arm_parameters"] for node in nodes("azure"))
    assert "priority" not in head and worker["priority"] == "Spot"
    # parameters that Ray's template does not have would make Azure refuse the node
    template = Path(azure.__file__).parent.parent / "_private" / "_azure" / "azure-vm-template.json"
    assert set(worker) <= set(json.loads(template.read_text())["parameters"])


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
def test_a_slip_in_a_cluster_is_found(cloud: str) -> None:
    config = cluster(cloud)
    config["available_node_types"]["gpu-spot"]["min_worker"] = 1
    with pytest.raises(ValidationError, match="min_worker"):
        validate_config(prepare_config(config))
