"""The manifests against the schemas of KubeRay's CRDs, which refuse unknown keys here, and the launcher's script.

kuberay-crds.json.xz holds their `openAPIV3Schema`, version v1, by plural: ray-project/kuberay, Apache-2.0, 2026-08-19.
"""

from __future__ import annotations

import copy
import functools
import json
import lzma
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from tests.places import ROOT

FOLDER = ROOT / "infra" / "kuberay"
CRDS = Path(__file__).parent / "kuberay-crds.json.xz"


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def strict(schema: Any) -> Any:
    """The schema without room for keys that it does not name."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema and "additionalProperties" not in schema:
        schema["additionalProperties"] = False
    return schema


@functools.cache
def schema_of(plural: str) -> Any:
    return strict(json.loads(lzma.decompress(CRDS.read_bytes()))[plural])


def faults(plural: str, document: Any, *path: str) -> list[str]:
    schema = functools.reduce(lambda part, name: part["properties"][name], path, schema_of(plural))
    return [f"{error.json_path}: {error.message}" for error in Draft7Validator(schema).iter_errors(document)]


@pytest.fixture(scope="module")
def ray_job() -> Any:
    (document,) = documents("rayjob.yaml")
    return document


@pytest.fixture(scope="module")
def cron_job() -> Any:
    (document,) = documents("cronjob.yaml")
    return document


def pods(spec: Any) -> Iterator[Any]:
    """The pod specs of a RayJob's spec."""
    cluster = spec["rayClusterSpec"]
    yield spec["submitterPodTemplate"]["spec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        yield group["template"]["spec"]


def test_the_ray_job_is_valid(ray_job: Any) -> None:
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")
    assert not faults("rayjobs", ray_job)


def test_the_ray_cron_job_is_valid_and_makes_the_same_ray_job(ray_job: Any) -> None:
    (cron,) = documents("raycronjob.yaml")
    assert cron["kind"] == "RayCronJob" and not faults("raycronjobs", cron)
    spec = copy.deepcopy(ray_job["spec"])
    spec["entrypoint"] = spec["entrypoint"].removesuffix(" --run-date NIGHT")
    assert cron["spec"]["jobTemplate"] == spec


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("spec", "activeDeadlineSecond"), 1, "activeDeadlineSecond"),
        (("spec", "backoffLimit"), "many", "backoffLimit"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "img"), "x", "img"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "password", "mode"),
    ],
)
def test_a_slip_in_a_manifest_is_found(ray_job: Any, path: tuple[Any, ...], value: Any, fault: str) -> None:
    broken = copy.deepcopy(ray_job)
    functools.reduce(lambda part, name: part[name], path[:-1], broken)[path[-1]] = value
    (found,) = faults("rayjobs", broken)
    assert fault in found


def test_pods_are_not_root_and_hold_no_secret_but_by_reference(ray_job: Any, cron_job: Any) -> None:
    launcher = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    for pod in [*pods(ray_job["spec"]), launcher]:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert set(container["resources"]) == {"requests", "limits"}
            assert {entry["name"] for entry in container.get("env", ())} <= {"HOME"}
    head, *workers = list(pods(ray_job["spec"]))[1:]
    assert all(pod["containers"][0]["envFrom"][0]["secretRef"] for pod in [head, *workers])
    assert all(int(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) for pod in workers)


def test_the_cron_job_creates_the_night_and_keeps_nights_apart(ray_job: Any, cron_job: Any) -> None:
    job = cron_job["spec"]["jobTemplate"]["spec"]
    assert not faults("rayjobs", job["template"], "spec", "submitterPodTemplate")
    assert cron_job["spec"]["concurrencyPolicy"] == "Forbid"
    assert job["activeDeadlineSeconds"] > ray_job["spec"]["activeDeadlineSeconds"]

    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    (generated,) = kustomization["configMapGenerator"]
    (volume,) = (item for item in job["template"]["spec"]["volumes"] if "configMap" in item)
    assert volume["configMap"]["name"] == generated["name"] and generated["files"] == ["rayjob.yaml"]
    assert all((FOLDER / name).is_file() for name in kustomization["resources"])

    kinds = {(item["kind"], item["metadata"]["name"]): item for item in documents("rbac.yaml")}
    account = job["template"]["spec"]["serviceAccountName"]
    assert ("ServiceAccount", account) in kinds
    assert kinds["RoleBinding", account]["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert kinds["Role", account]["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]
    for pod in pods(ray_job["spec"]):
        assert ("ServiceAccount", pod["serviceAccountName"]) in kinds
        assert pod["automountServiceAccountToken"] == (pod["serviceAccountName"] == "alfa-head")


def test_the_cluster_grows_from_nothing_for_a_night_that_waits_for_it(ray_job: Any) -> None:
    cluster = ray_job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True and cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == 0 < group["maxReplicas"]
        tolerated = {each["key"] for each in group["template"]["spec"]["tolerations"]}
        assert {"nvidia.com/gpu", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= tolerated
    # the autoscaler's second version replaces pods itself
    assert all(pod["restartPolicy"] == "Never" for pod in pods(ray_job["spec"]))


_KUBECTL = """#!/bin/sh
echo "$1 $2 $3" >> calls
case $1 in
  create) cat > created.yaml; exit {created} ;;
  get) head -n 1 states; sed -i 1d states ;;
esac
"""


@pytest.mark.parametrize(
    ("created", "states", "code"),
    [
        (0, [" ", "Initializing ", "Running RUNNING", "Complete SUCCEEDED"], 0),
        (0, ["Running RUNNING", "Retrying ", "Failed FAILED", "the reason"], 1),
        (0, ["Complete FAILED", "the reason"], 1),
        (1, ["the RayJob is there already", "Complete SUCCEEDED"], 0),
    ],
)
def test_the_launcher_waits_for_the_end_of_the_night(
    cron_job: Any, tmp_path: Path, created: int, states: list[str], code: int
) -> None:
    """With a kubectl that answers as told, and a sleep that does not."""
    (launcher,) = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    script = launcher["args"][0].replace("/etc/alfa", str(FOLDER))
    for name, text in (("kubectl", _KUBECTL.format(created=created)), ("sleep", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*launcher["command"], script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == code, done.stderr
    assert (tmp_path / "states").read_text() == "" and ("the reason" in done.stdout) == bool(code)
    manifest = yaml.safe_load((tmp_path / "created.yaml").read_text())
    night = manifest["metadata"]["name"].removeprefix("alfa-")
    assert manifest["spec"]["entrypoint"].endswith(f" --run-date {night}") and "NIGHT" not in str(manifest)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "create -f -" and set(calls[1:]) == {f"get rayjob alfa-{night}"}
