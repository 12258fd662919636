"""RayJob and RayCluster manifests against KubeRay's schemas and against the rules schemas miss."""

from __future__ import annotations

import copy
import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

import pytest

from deployment.custom_resources import SCHEMAS, problems, strict, with_defaults
from deployment.manifests import (
    K8S,
    asked,
    cluster_spec,
    groups,
    image_root,
    pinned,
    quantity,
    ray_manifests,
    workers_per_pod,
)
from deployment.rules import RULES, broken_rules

MANIFESTS = ray_manifests()
Change = Callable[[dict[str, Any]], None]


def manifest(folder: str) -> dict[str, Any]:
    return copy.deepcopy(dict(MANIFESTS)[folder])


def at(document: dict[str, Any], path: str) -> Any:
    """The value at a dotted path; numbers index lists, `C` is the cluster's spec, `GPU` its name."""
    node: Any = document
    for part in filter(None, path.split(".")):
        if part == "C":
            node = cluster_spec(document)
        else:
            node = node[step(part)]
    return node


def step(part: str) -> str | int:
    return int(part) if part.isdigit() else {"GPU": "nvidia.com/gpu"}.get(part, part)


def put(path: str, value: Any) -> Change:
    parent, _, key = path.rpartition(".")

    def change(document: dict[str, Any]) -> None:
        node = at(document, parent)
        node[step(key)] = value

    return change


def drop(path: str) -> Change:
    parent, _, key = path.rpartition(".")

    def change(document: dict[str, Any]) -> None:
        node = at(document, parent)
        del node[step(key)]

    return change


def add(path: str, value: Any) -> Change:
    return lambda document: at(document, path).append(value)


HEAD = "C.headGroupSpec"
HEAD_POD = f"{HEAD}.template.spec"
HEAD_BOX = f"{HEAD_POD}.containers.0"
GROUP = "C.workerGroupSpecs.0"
POD = f"{GROUP}.template.spec"
BOX = f"{POD}.containers.0"
TRAIN = f"python {image_root()}/jobs/train.py {image_root()}/jobs/configs/digits.yaml"
SMOKE = f"{TRAIN} --name a --storage /mnt/runs --set data.shards=/mnt/runs/d"


def test_every_manifest_is_found() -> None:
    assert {folder for folder, _ in MANIFESTS} == {
        "cpu-smoke",
        "gpu-on-demand",
        "gpu-spot",
        "raycluster",
    }


@pytest.mark.parametrize("folder", dict(MANIFESTS))
def test_manifest_fits_its_schema(folder: str) -> None:
    assert problems(manifest(folder)) == []


@pytest.mark.parametrize("folder", dict(MANIFESTS))
def test_manifest_keeps_every_rule(folder: str) -> None:
    assert broken_rules(manifest(folder)) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (put(f"{GROUP}.minReplica", 1), "'minReplica' was unexpected"),
        (put("spec.entryPoint", "x"), "'entryPoint' was unexpected"),
        (put(f"{POD}.terminationGracePeriod", 120), "'terminationGracePeriod' was unexpected"),
        (put(f"{BOX}.resources.limit", {}), "'limit' was unexpected"),
        (put(f"{GROUP}.maxReplicas", "8"), "is not of type 'integer'"),
        (drop(f"{GROUP}.groupName"), "'groupName' is a required property"),
        (put("C.autoscalerOptions.version", "v3"), "is not one of"),
        (put(f"{BOX}.resources.limits.cpu", 1.5), "is not of type"),
        (put(f"{BOX}.env.0.value", 1), "is not of type 'string'"),
        (add(f"{BOX}.env", {"name": "HOME", "value": "/"}), "('HOME',) twice"),
        (put("apiVersion", "ray.io/v1alpha1"), "was expected"),
        (drop("metadata.name"), "'name' is a required property"),
    ],
)
def test_schema_refuses_what_a_server_drops_or_refuses(change: Change, complaint: str) -> None:
    document = manifest("cpu-smoke")
    change(document)
    found = problems(document)
    assert any(complaint in line for line in found), found


def test_schema_takes_numbers_and_text_for_quantities() -> None:
    document = manifest("cpu-smoke")
    for value in (2, "2", "500m", "1.5"):
        put(f"{BOX}.resources.limits.cpu", value)(document)
        assert problems(document) == []


def test_defaults_stand_in_for_required_fields() -> None:
    document = manifest("cpu-smoke")
    drop(f"{GROUP}.minReplicas")(document)
    assert problems(document) == []
    node = {"properties": {"a": {"default": 3}, "b": {}}}
    assert with_defaults({"b": 1}, node) == {"a": 3, "b": 1}


def test_strict_schema_leaves_free_form_objects_alone() -> None:
    node = strict({"type": "object", "additionalProperties": {"type": "string"}})
    assert node == {"type": "object", "additionalProperties": {"type": "string"}}
    assert strict({"type": "object"}) == {"type": "object"}


def test_schemas_are_whole_small_and_have_their_notice() -> None:
    notice = (K8S / "schemas" / "NOTICE").read_text(encoding="utf-8")
    for path in SCHEMAS.values():
        assert path.name in notice
        assert path.stat().st_size < 1_000_000
        spec = json.loads(path.read_text(encoding="utf-8"))["properties"]["spec"]
        assert len(spec["properties"]) > 10
    assert "Apache License" in notice


def retire(document: dict[str, Any]) -> None:
    document["metadata"].setdefault("annotations", {})["ray.io/ft-enabled"] = "true"


def queue(document: dict[str, Any]) -> None:
    document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "q"


CONTROLS: list[tuple[str, str, Change]] = [
    ("cpu-smoke", "names_fit", put("metadata.name", "kfac-" + "x" * 43)),
    ("raycluster", "names_fit", put("metadata.name", "1cluster")),
    ("gpu-spot", "names_fit", put(f"{GROUP}.groupName", "on-demand")),
    ("cpu-smoke", "replicas_are_ordered", put(f"{GROUP}.minReplicas", 3)),
    ("cpu-smoke", "replicas_are_ordered", put(f"{GROUP}.replicas", 9)),
    ("cpu-smoke", "resources_are_bounded", put(f"{BOX}.resources.requests.cpu", "2")),
    ("cpu-smoke", "resources_are_bounded", put(f"{BOX}.resources.requests.memory", "1Gi")),
    ("cpu-smoke", "resources_are_bounded", drop(f"{BOX}.resources.limits.memory")),
    ("gpu-spot", "resources_are_bounded", drop(f"{BOX}.resources.limits.GPU")),
    ("cpu-smoke", "versions_agree", put("C.rayVersion", "2.59.0")),
    ("cpu-smoke", "versions_agree", put(f"{BOX}.image", "elastic-kfac:latest")),
    ("cpu-smoke", "versions_agree", put("spec.submitterPodTemplate.spec.containers.0.image", "a")),
    ("cpu-smoke", "autoscaler_is_v2", put("C.autoscalerOptions.version", "v1")),
    ("raycluster", "autoscaler_is_v2", put("C.enableInTreeAutoscaling", False)),
    ("cpu-smoke", "autoscaler_is_v2", put(f"{POD}.restartPolicy", "Always")),
    ("cpu-smoke", "autoscaler_is_v2", put(f"{GROUP}.suspend", True)),
    (
        "cpu-smoke",
        "gcs_fault_tolerance_has_one_source",
        add(f"{HEAD_BOX}.env", {"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}),
    ),
    ("cpu-smoke", "gcs_fault_tolerance_has_one_source", retire),
    (
        "cpu-smoke",
        "gcs_fault_tolerance_has_one_source",
        put("C.gcsFaultToleranceOptions", {"redisAddress": "r:1", "redisPassword": {"value": "x"}}),
    ),
    (
        "cpu-smoke",
        "gcs_fault_tolerance_has_one_source",
        put(f"{HEAD}.rayStartParams.redis-password", "x"),
    ),
    ("cpu-smoke", "drains_end_before_the_kill", drop(f"{POD}.terminationGracePeriodSeconds")),
    ("cpu-smoke", "drains_end_before_the_kill", put(f"{BOX}.env.2.value", "119")),
    ("cpu-smoke", "drains_end_before_the_kill", drop(f"{HEAD_BOX}.env.2")),
    ("cpu-smoke", "head_only_leads", drop(f"{HEAD}.rayStartParams.num-cpus")),
    ("cpu-smoke", "head_only_leads", drop(f"{HEAD_BOX}.ports.3")),
    ("cpu-smoke", "head_only_leads", drop(f"{BOX}.ports.0")),
    ("gpu-spot", "spot_has_a_fallback", drop("C.workerGroupSpecs.1")),
    ("gpu-spot", "spot_has_a_fallback", put(f"{GROUP}.priority", 10)),
    ("gpu-spot", "spot_has_a_fallback", drop(f"{POD}.nodeSelector")),
    ("gpu-spot", "spot_has_a_fallback", drop(f"{POD}.tolerations.1")),
    ("gpu-spot", "spot_has_a_fallback", put(f"{GROUP}.minReplicas", 1)),
    ("cpu-smoke", "workers_agree_with_configuration", put(f"{GROUP}.maxReplicas", 3)),
    ("cpu-smoke", "workers_agree_with_configuration", put(f"{GROUP}.minReplicas", 0)),
    (
        "cpu-smoke",
        "workers_agree_with_configuration",
        put("spec.entrypoint", f"{SMOKE} --set elastic.max_workers=4"),
    ),
    (
        "gpu-on-demand",
        "workers_agree_with_configuration",
        drop(f"{BOX}.resources.limits.GPU"),
    ),
    ("cpu-smoke", "entrypoint_is_accepted", put("spec.entrypoint", f"{SMOKE} --storge x")),
    ("cpu-smoke", "entrypoint_is_accepted", put("spec.entrypoint", f"{SMOKE} --set a.b=1")),
    (
        "cpu-smoke",
        "entrypoint_is_accepted",
        put("spec.entrypoint", SMOKE.replace("digits", "no_such_file")),
    ),
    ("cpu-smoke", "entrypoint_is_accepted", put("spec.entrypoint", "python jobs/train.py x")),
    ("cpu-smoke", "entrypoint_is_accepted", put("spec.entrypoint", SMOKE.replace(" --name a", ""))),
    (
        "cpu-smoke",
        "entrypoint_is_accepted",
        put("spec.entrypoint", SMOKE.replace("/mnt/runs", "/tmp")),
    ),
    ("cpu-smoke", "entrypoint_is_accepted", drop(f"{BOX}.volumeMounts.2")),
    ("cpu-smoke", "job_ends_and_cleans_up", put("spec.shutdownAfterJobFinishes", False)),
    ("cpu-smoke", "job_ends_and_cleans_up", put("spec.activeDeadlineSeconds", 0)),
    (
        "cpu-smoke",
        "job_ends_and_cleans_up",
        put("spec.deletionStrategy", {"deletionRules": [{"policy": "DeleteSelf"}]}),
    ),
    ("cpu-smoke", "job_ends_and_cleans_up", put("spec.runtimeEnvYAML", "- a")),
    ("cpu-smoke", "pods_have_no_privileges", put(f"{POD}.securityContext.runAsUser", 0)),
    ("cpu-smoke", "pods_have_no_privileges", put(f"{POD}.hostNetwork", True)),
    ("cpu-smoke", "pods_have_no_privileges", drop(f"{POD}.automountServiceAccountToken")),
    ("cpu-smoke", "pods_have_no_privileges", put(f"{POD}.volumes.1", {"hostPath": {"path": "/"}})),
    ("cpu-smoke", "pods_have_no_privileges", drop(f"{BOX}.securityContext.capabilities")),
    ("cpu-smoke", "pods_have_no_privileges", drop("C.autoscalerOptions.securityContext")),
    ("cpu-smoke", "volumes_are_mounted", drop(f"{BOX}.volumeMounts.1")),
    ("cpu-smoke", "volumes_are_mounted", put(f"{POD}.volumes.0.emptyDir.sizeLimit", "3Gi")),
    ("cpu-smoke", "volumes_are_mounted", drop(f"{POD}.volumes.0.emptyDir.medium")),
    ("cpu-smoke", "autoscaler_can_write", drop("C.autoscalerOptions.volumeMounts")),
    ("raycluster", "autoscaler_can_write", put("C.autoscalerOptions.volumeMounts.0.name", "x")),
    (
        "cpu-smoke",
        "nothing_is_secret",
        add(f"{BOX}.env", {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}),
    ),
    ("cpu-smoke", "nothing_is_secret", put("C.authOptions.mode", "disabled")),
    ("cpu-smoke", "kueue_admits", queue),
]


@pytest.mark.parametrize(
    ("folder", "rule", "change"), CONTROLS, ids=[f"{n}-{c[1]}" for n, c in enumerate(CONTROLS)]
)
def test_rule_sees_a_broken_manifest(folder: str, rule: str, change: Change) -> None:
    (judge,) = (entry for entry in RULES if entry.__name__ == rule)
    document = manifest(folder)
    assert list(judge(document)) == []
    change(document)
    assert list(judge(document)) != []


def test_every_rule_has_a_control() -> None:
    assert {rule for _, rule, _ in CONTROLS} == {rule.__name__ for rule in RULES}


def test_workers_of_a_pod_are_what_its_scarcest_resource_allows() -> None:
    document = manifest("gpu-on-demand")
    config = asked(document["spec"]["entrypoint"]).config
    assert config is not None
    group = groups(document)[0]
    assert workers_per_pod(group, config) == 1
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    limits["nvidia.com/gpu"] = "4"
    assert workers_per_pod(group, config) == 4
    limits["cpu"] = "2500m"
    assert workers_per_pod(group, config) == 2


@pytest.mark.parametrize(
    ("text", "number"), [("500m", 0.5), ("2", 2), (3, 3), ("1Gi", 2**30), ("1.5Ki", 1536)]
)
def test_quantity_reads_what_kubernetes_writes(text: str | int, number: float) -> None:
    assert quantity(text) == number


def test_quantity_of_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="not a quantity"):
        quantity("1 GB")


def test_installed_ray_is_the_pinned_one() -> None:
    assert importlib.metadata.version("ray") == pinned("ray")
