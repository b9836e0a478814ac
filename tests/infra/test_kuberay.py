"""The manifests of each environment against the schemas of KubeRay's CRDs, and the launcher's script.

The schemas refuse unknown keys here. kuberay-crds.json.xz holds their `openAPIV3Schema`, version v1, by plural:
ray-project/kuberay, Apache-2.0, 2026-08-19.
"""

from __future__ import annotations

import copy
import functools
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from tests.places import ROOT

FOLDER = ROOT / "infra" / "kuberay"
KUBECTL = shutil.which("kubectl")
CRDS = Path(__file__).parent / "kuberay-crds.json.xz"


needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="there is no kubectl")

Deployment = dict[tuple[str, str], Any]
"""Manifests by kind and name."""


@functools.cache
def rendered(folder: str) -> str:
    """Returns the manifests that `kubectl apply --kustomize` would send; those of the base need no kubectl."""
    if folder == "base":
        kustomization = yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text())
        return "\n---\n".join((FOLDER / folder / name).read_text() for name in kustomization["resources"])
    assert KUBECTL
    return subprocess.run(
        [KUBECTL, "kustomize", str(FOLDER / folder)], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def manifests(folder: str) -> Deployment:
    documents = list(yaml.safe_load_all(rendered(folder)))
    found = {(each["kind"], each["metadata"]["name"]): each for each in documents}
    assert len(found) == len(documents)
    return found


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


ENVIRONMENTS = [
    "base",
    *(
        pytest.param(f"overlays/{each.name}", marks=needs_kubectl, id=each.name)
        for each in sorted((FOLDER / "overlays").iterdir())
    ),
]


@pytest.fixture(params=ENVIRONMENTS)
def deployment(request: pytest.FixtureRequest) -> Deployment:
    return manifests(request.param)


@pytest.fixture
def ray_job(deployment: Deployment) -> Any:
    return deployment["RayJob", "alfa-nightly"]


@pytest.fixture
def cron_job(deployment: Deployment) -> Any:
    return deployment["CronJob", "alfa-nightly"]


def pods(spec: Any) -> Iterator[Any]:
    """The pod specs of a RayJob's spec."""
    cluster = spec["rayClusterSpec"]
    yield spec["submitterPodTemplate"]["spec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        yield group["template"]["spec"]


def test_the_ray_job_is_valid_and_never_runs_itself(ray_job: Any) -> None:
    assert ray_job["apiVersion"] == "ray.io/v1"
    assert not faults("rayjobs", ray_job)
    assert ray_job["spec"]["suspend"] is True and ray_job["spec"]["shutdownAfterJobFinishes"] is True
    assert re.fullmatch(r"alfa --log-format json score s3://\S+\.yaml --run-date NIGHT", ray_job["spec"]["entrypoint"])
    assert str(ray_job).count("NIGHT") == 1


def test_the_ray_job_runs_without_the_cron_job_as_its_header_says(tmp_path: Path) -> None:
    (command,) = re.findall(r"^#   (sed .*) rayjob\.yaml \| kubectl create -f -$", rendered("base"), re.MULTILINE)
    file = FOLDER / "base" / "rayjob.yaml"
    night = yaml.safe_load(subprocess.check_output(["/bin/sh", "-euc", f"{command} {file}"], text=True))
    expected = copy.deepcopy(manifests("base")["RayJob", "alfa-nightly"])
    expected["metadata"]["name"] = "alfa-2026-01-31"
    expected["spec"] |= {"suspend": False, "entrypoint": expected["spec"]["entrypoint"].replace("NIGHT", "2026-01-31")}
    assert night == expected


@needs_kubectl
@pytest.mark.parametrize(
    ("cloud", "pool"), [("gcp", "cloud.google.com/gke-spot"), ("azure", "kubernetes.azure.com/scalesetpriority")]
)
def test_the_patches_on_the_pages_of_clouds_make_valid_manifests(cloud: str, pool: str, tmp_path: Path) -> None:
    (patches,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "infra" / cloud / "README.md").read_text(), re.DOTALL)
    shutil.copytree(FOLDER / "base", tmp_path / "base")
    (tmp_path / cloud).mkdir()
    (tmp_path / cloud / "kustomization.yaml").write_text(f"resources: [../base]\npatches:\n{patches}")
    assert KUBECTL
    text = subprocess.check_output([KUBECTL, "kustomize", str(tmp_path / cloud)], text=True, timeout=60)
    found = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(text)}
    night = found["RayJob", "alfa-nightly"]
    assert not faults("rayjobs", night)
    *_, worker = pods(night["spec"])
    assert list(worker["nodeSelector"]) == [pool] and pool in {each["key"] for each in worker["tolerations"]}
    accounts = [found["ServiceAccount", name]["metadata"] for name in ("alfa", "alfa-head", "alfa-launcher")]
    assert ["annotations" in each for each in accounts] == [True, True, False]


@needs_kubectl
def test_environments_differ_where_they_should() -> None:
    production, staging = (manifests(f"overlays/{name}") for name in ("production", "staging"))
    assert production.keys() == staging.keys() == manifests("base").keys()
    for found, namespace, image in (
        (production, "alfa", "123456789012.dkr.ecr.eu-central-1.amazonaws.com/alfa:0.1.0"),
        (staging, "alfa-staging", "registry.example.com/alfa:main"),
    ):
        assert {each["metadata"]["namespace"] for each in found.values()} == {namespace}
        assert found["RoleBinding", "alfa-launcher"]["subjects"][0]["namespace"] == namespace
        night = found["RayJob", "alfa-nightly"]["spec"]
        assert {container["image"] for pod in pods(night) for container in pod["containers"]} == {image}

    roles = [production["ServiceAccount", name]["metadata"]["annotations"] for name in ("alfa", "alfa-head")]
    assert roles == [{"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/alfa"}] * 2
    assert "annotations" not in production["ServiceAccount", "alfa-launcher"]["metadata"]
    _, head, worker = pods(production["RayJob", "alfa-nightly"]["spec"])
    assert head["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}
    assert worker["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}

    groups = [
        each["RayJob", "alfa-nightly"]["spec"]["rayClusterSpec"]["workerGroupSpecs"] for each in (production, staging)
    ]
    assert [[(group["groupName"], group["maxReplicas"]) for group in each] for each in groups] == [
        [("gpu", 16)],
        [("cpu", 2)],
    ]
    schedules = [each["CronJob", "alfa-nightly"]["spec"]["schedule"] for each in (production, staging)]
    assert schedules == ["0 22 * * *", "0 12 * * 1-5"]


def test_the_ray_cron_job_is_valid_and_makes_the_same_ray_job() -> None:
    cron = yaml.safe_load((FOLDER / "raycronjob.yaml").read_text())
    assert cron["kind"] == "RayCronJob" and not faults("raycronjobs", cron)
    spec = copy.deepcopy(manifests("base")["RayJob", "alfa-nightly"]["spec"])
    assert spec.pop("suspend")
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
    assert all(set(pod["containers"][0]["resources"]["limits"]) >= {"cpu", "memory"} for pod in workers)


def test_the_cron_job_creates_the_night_and_keeps_nights_apart(
    deployment: Deployment, ray_job: Any, cron_job: Any
) -> None:
    job = cron_job["spec"]["jobTemplate"]["spec"]
    assert not faults("rayjobs", job["template"], "spec", "submitterPodTemplate")
    assert cron_job["spec"]["concurrencyPolicy"] == "Forbid"
    assert job["activeDeadlineSeconds"] > ray_job["spec"]["activeDeadlineSeconds"]

    account = job["template"]["spec"]["serviceAccountName"]
    assert ("ServiceAccount", account) in deployment
    (subject,) = deployment["RoleBinding", account]["subjects"]
    assert (subject["kind"], subject["name"]) == ("ServiceAccount", account)
    assert deployment["Role", account]["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]
    for pod in pods(ray_job["spec"]):
        assert ("ServiceAccount", pod["serviceAccountName"]) in deployment
        assert pod["automountServiceAccountToken"] == (pod["serviceAccountName"] == "alfa-head")


def test_the_cluster_grows_from_nothing_for_a_night_that_waits_for_it(ray_job: Any) -> None:
    cluster = ray_job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True and cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
        pod = group["template"]["spec"]
        has_gpu = pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") == "1"
        assert has_gpu == (group["groupName"] == "gpu")
        tolerated = {each["key"] for each in pod.get("tolerations", ())}
        spot_with_gpu = {"nvidia.com/gpu", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"}
        assert tolerated == (spot_with_gpu if has_gpu else set())
    # the autoscaler's second version replaces pods itself
    assert all(pod["restartPolicy"] == "Never" for pod in pods(ray_job["spec"]))


# As kubectl answers: `get -o json` shows what the cluster has added to a manifest, other gets one of the states.
_KUBECTL = """#!/bin/sh
echo "$1 $2 $3" >> calls
case "$*" in
  "get rayjob alfa-nightly -o json") cat template.json ;;
  patch*) exec {patch} "$@" ;;
  create*) cat > created.yaml; exit {created} ;;
  get*) head -n 1 states; sed -i 1d states ;;
esac
"""

# JSON merge patches (RFC 7396), where there is no kubectl
_PATCH = """
import json, sys

def merge(old, patch):
    if not isinstance(patch, dict):
        return patch
    old = old if isinstance(old, dict) else {}
    kept = {key: value for key, value in old.items() if patch.get(key, 0) is not None}
    return kept | {key: merge(kept.get(key), value) for key, value in patch.items() if value is not None}

options = sys.argv[1:]
assert {*options} >= {"patch", "--local", "-f", "-", "--type=merge", "-o", "json"}
print(json.dumps(merge(json.load(sys.stdin), json.loads(options[options.index("-p") + 1])), indent=4))
"""


def launch(cron_job: Any, folder: Path, night: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the launcher's script with the kubectl in folder, and a sleep that does not."""
    (launcher,) = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    (folder / "sleep").write_text("#!/bin/sh\n")
    for name in ("kubectl", "sleep"):
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"} | ({"NIGHT": night} if night else {})
    return subprocess.run(
        [*launcher["command"], *launcher["args"]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("patch", ["reference", pytest.param("kubectl", marks=needs_kubectl)])
@pytest.mark.parametrize(
    ("created", "states", "code", "night"),
    [
        (0, [" ", "Initializing ", "Running RUNNING", "Complete SUCCEEDED"], 0, None),
        (0, ["Running RUNNING", "Retrying ", "Failed FAILED", "the reason"], 1, "2026-01-31"),
        (0, ["Complete FAILED", "the reason"], 1, None),
        (1, ["the RayJob is there already", "Complete SUCCEEDED"], 0, None),
    ],
)
def test_the_launcher_waits_for_the_end_of_the_night(
    tmp_path: Path, patch: str, created: int, states: list[str], code: int, night: str | None
) -> None:
    found = manifests("base")
    template = found["RayJob", "alfa-nightly"]
    (tmp_path / "patch.py").write_text(_PATCH)
    command = KUBECTL if patch == "kubectl" else f"{sys.executable} {tmp_path / 'patch.py'}"
    (tmp_path / "kubectl").write_text(_KUBECTL.format(patch=command, created=created))
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    of_the_server = {
        "uid": "0",
        "resourceVersion": "1",
        "annotations": {"a": "b"},
        "finalizers": ["ray.io/rayjob-finalizer"],
    }
    stored = {
        **template,
        "metadata": template["metadata"] | of_the_server,
        "status": {"jobDeploymentStatus": "Suspended"},
    }
    (tmp_path / "template.json").write_text(json.dumps(stored, indent=4))
    done = launch(found["CronJob", "alfa-nightly"], tmp_path, night)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "states").read_text() == "" and ("the reason" in done.stdout) == bool(code)

    manifest = yaml.safe_load((tmp_path / "created.yaml").read_text())
    tonight = manifest["metadata"]["name"].removeprefix("alfa-")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", tonight) and (night is None or tonight == night)
    expected = copy.deepcopy(template)
    expected["metadata"]["name"] = f"alfa-{tonight}"
    expected["spec"] |= {"suspend": False, "entrypoint": expected["spec"]["entrypoint"].replace("NIGHT", tonight)}
    assert manifest == expected
    calls = (tmp_path / "calls").read_text().splitlines()
    # the first three are side by side, in a pipe
    assert set(calls[:3]) == {"get rayjob alfa-nightly", "patch --local -f", "create -f -"}
    assert calls[3:] and set(calls[3:]) == {f"get rayjob alfa-{tonight}"}


def test_the_launcher_fails_where_there_is_nothing_to_copy(tmp_path: Path) -> None:
    (tmp_path / "kubectl").write_text("#!/bin/sh\necho 'Error: not found' >&2\nexit 1\n")
    done = launch(manifests("base")["CronJob", "alfa-nightly"], tmp_path)
    assert done.returncode == 1 and "not found" in done.stderr
