"""What schemas cannot say: rules of KubeRay's operator, of Kueue, and our own, one function each.

Each takes a RayJob or RayCluster and yields a line for everything that is wrong with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from deployment.manifests import (
    asked,
    cluster_spec,
    groups,
    image_tag,
    pinned,
    pods,
    quantity,
    workers_per_pod,
)
from elastic_kfac.errors import ElasticKfacError

Document = dict[str, Any]
Rule = Callable[[Document], Iterator[str]]

MIN_GRACE_S = 120
KILL_MARGIN_S = 15
"""What a pod needs after its drain to end its processes."""
MAX_NAME = {"RayJob": 47, "RayCluster": 53}
HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
HEAD_PORTS |= {"as-metrics": 44217, "dash-metrics": 44227}
MARKET = "ray.io/market-type"
OBJECT_STORES = ("s3://", "gs://")
_SECRET_NAME = re.compile(r"PASS|SECRET|TOKEN|(?:ACCESS|API|PRIVATE)_?KEY", re.IGNORECASE)


def names_fit(document: Document) -> Iterator[str]:
    name, longest = document["metadata"]["name"], MAX_NAME[document["kind"]]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > longest:
        yield f"name {name}: lower-case letters, digits and '-', at most {longest}"
    group_names = [group["groupName"] for group in groups(document)]
    if len(set(group_names)) < len(group_names) or "head" in group_names or len(group_names) > 7:
        yield f"groups {group_names}: different names, none of them head, at most 7"


def replicas_are_ordered(document: Document) -> Iterator[str]:
    for group in groups(document):
        low, wanted, high = (
            group.get(key, 0) for key in ("minReplicas", "replicas", "maxReplicas")
        )
        if not 0 <= low <= wanted <= high:
            yield f"{group['groupName']}: minReplicas {low}, replicas {wanted}, maxReplicas {high}"


def resources_are_bounded(document: Document) -> Iterator[str]:
    for pod in pods(document):
        for container in pod.spec["containers"]:
            limits = container.get("resources", {}).get("limits", {})
            requests = container.get("resources", {}).get("requests", {})
            if not {"cpu", "memory"} <= set(limits):
                yield f"{pod.name}: limits for cpu and memory are missing"
            for name, wanted in requests.items():
                if name in limits and quantity(wanted) > quantity(limits[name]):
                    yield f"{pod.name}: request of {name} above its limit"
            if requests.get("memory") != limits.get("memory"):
                yield f"{pod.name}: memory request and limit differ"
            if requests.get("nvidia.com/gpu") != limits.get("nvidia.com/gpu"):
                yield f"{pod.name}: GPUs belong into limits, and requests equal them"


def versions_agree(document: Document) -> Iterator[str]:
    if cluster_spec(document).get("rayVersion") != pinned("ray"):
        yield f"rayVersion is not {pinned('ray')} of constraints.txt"
    for pod in pods(document):
        for container in pod.spec["containers"]:
            if container["image"].rpartition(":")[2] != image_tag():
                yield f"{pod.name}: image {container['image']} is not tagged {image_tag()}"


def autoscaler_is_v2(document: Document) -> Iterator[str]:
    spec = cluster_spec(document)
    is_v2 = spec.get("autoscalerOptions", {}).get("version") == "v2"
    if not (spec.get("enableInTreeAutoscaling") and is_v2):
        yield "elastic clusters need enableInTreeAutoscaling and autoscalerOptions.version v2"
        for group in groups(document):
            if "idleTimeoutSeconds" in group or group.get("priority", 0):
                yield f"{group['groupName']}: idleTimeoutSeconds and priority need autoscaler v2"
    for pod in pods(document, "head", "worker"):
        if pod.spec.get("restartPolicy", "Never") != "Never":
            yield f"{pod.name}: restartPolicy must be Never or unset with autoscaler v2"
    for group in groups(document):
        if group.get("suspend"):
            yield f"{group['groupName']}: cannot be suspended with the autoscaler"


def gcs_fault_tolerance_has_one_source(document: Document) -> Iterator[str]:
    head = next(pods(document, "head"))
    for name in {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"} & set(head.environment):
        yield f"{name} belongs into gcsFaultToleranceOptions"
    for name in {"ray.io/ft-enabled", "ray.io/external-storage-namespace"}:
        if name in document["metadata"].get("annotations", {}):
            yield f"annotation {name} belongs into gcsFaultToleranceOptions"
    options = cluster_spec(document).get("gcsFaultToleranceOptions")
    if options is not None:
        if not options.get("redisAddress"):
            yield "gcsFaultToleranceOptions without redisAddress"
        if "secretKeyRef" not in options.get("redisPassword", {}).get("valueFrom", {}):
            yield "the password of Redis must come from a Secret"
    start = cluster_spec(document)["headGroupSpec"].get("rayStartParams", {})
    for name in {"redis-password", "redis-username"} & set(start):
        yield f"{name} belongs into gcsFaultToleranceOptions"


def drains_end_before_the_kill(document: Document) -> Iterator[str]:
    for pod in pods(document, "head", "worker"):
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        drain = float(pod.environment.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or 30)
        if grace < MIN_GRACE_S:
            yield f"{pod.name}: grace period of {grace} s is below {MIN_GRACE_S} s"
        if not 60 <= drain <= grace - KILL_MARGIN_S:
            yield f"{pod.name}: drain of {drain:g} s does not fit the grace period of {grace} s"


def head_only_leads(document: Document) -> Iterator[str]:
    if cluster_spec(document)["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
        yield 'the head must not work: rayStartParams.num-cpus "0"'
    head = next(pods(document, "head"))
    ports = {p["name"]: p["containerPort"] for p in head.ray_container.get("ports", [])}
    if ports != HEAD_PORTS:
        yield f"ports of the head are {ports}"
    for pod in pods(document, "worker"):
        if {"name": "metrics", "containerPort": 8080} not in pod.ray_container.get("ports", []):
            yield f"{pod.name}: no metrics port"


def spot_has_a_fallback(document: Document) -> Iterator[str]:
    found = groups(document)
    spot = [group for group in found if group.get("labels", {}).get(MARKET) == "spot"]
    rest = [group for group in found if group not in spot]
    for group in spot:
        spec, name = group["template"]["spec"], group["groupName"]
        if spec.get("nodeSelector", {}).get(MARKET) != "spot":
            yield f"{name}: no nodeSelector for spot nodes"
        if not any(t.get("key") == MARKET for t in spec.get("tolerations", [])):
            yield f"{name}: does not tolerate the taint of spot nodes"
        if group.get("minReplicas", 0):
            yield f"{name}: minReplicas on nodes that may all go"
        if not rest or group.get("priority", 0) <= max(g.get("priority", 0) for g in rest):
            yield f"{name}: no on-demand group of lower priority to fall back to"


def workers_agree_with_configuration(document: Document) -> Iterator[str]:
    if document["kind"] != "RayJob":
        return
    wanted = asked(document["spec"]["entrypoint"])
    config = wanted.config
    if config is None:
        return
    least = sum(g.get("minReplicas", 0) * workers_per_pod(g, config) for g in groups(document))
    most = [g["maxReplicas"] * workers_per_pod(g, config) for g in groups(document)]
    if least != wanted.least:
        yield f"room for {least} workers at least, elastic.min_workers {wanted.least}"
    if set(most) != {wanted.most}:
        yield f"room for {most} workers at most, elastic.max_workers {wanted.most}"
    if any(workers_per_pod(group, config) < 1 for group in groups(document)):
        yield "a pod that is too small for one worker"


def entrypoint_is_accepted(document: Document) -> Iterator[str]:
    if document["kind"] != "RayJob":
        return
    try:
        wanted = asked(document["spec"]["entrypoint"])
    except (ElasticKfacError, ValueError) as error:
        yield f"entrypoint: {error}"
        return
    if document["spec"].get("backoffLimit", 0) and not wanted.name:
        yield "tries again under another name: add --name"
    for uri in wanted.places:
        if uri.startswith(OBJECT_STORES):
            continue
        for pod in pods(document, "head", "worker"):
            if not _shared_below(pod.spec, uri):
                yield f"{pod.name}: {uri} is on no shared volume"


def _shared_below(spec: Document, path: str) -> bool:
    claims = {v["name"] for v in spec.get("volumes", []) if "persistentVolumeClaim" in v}
    return any(
        mount["name"] in claims and f"{path}/".startswith(f"{mount['mountPath']}/")
        for mount in spec["containers"][0].get("volumeMounts", [])
    )


def job_ends_and_cleans_up(document: Document) -> Iterator[str]:
    if document["kind"] != "RayJob":
        return
    spec = document["spec"]
    shuts_down = spec.get("shutdownAfterJobFinishes", False)
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    if shuts_down == bool(rules):
        yield "exactly one of shutdownAfterJobFinishes and deletionStrategy.deletionRules"
    if spec.get("ttlSecondsAfterFinished", 0) and not shuts_down:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("suspend") and not shuts_down:
        yield "suspend needs shutdownAfterJobFinishes"
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(name, 0) <= 0:
            yield f"{name} must be positive"
    environment = yaml.safe_load(spec.get("runtimeEnvYAML") or "{}")
    if not isinstance(environment, dict):
        yield "runtimeEnvYAML is no mapping"


def pods_have_no_privileges(document: Document) -> Iterator[str]:
    for pod in pods(document):
        spec, security = pod.spec, pod.spec.get("securityContext", {})
        if not security.get("runAsNonRoot") or not security.get("runAsUser"):
            yield f"{pod.name}: runs as root"
        if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.name}: no seccomp profile"
        if any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{pod.name}: uses the host's namespaces"
        if any("hostPath" in volume for volume in spec.get("volumes", [])):
            yield f"{pod.name}: mounts the host's files"
        if pod.role != "head" and spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.name}: carries a token of the Kubernetes API"
        for container in spec["containers"]:
            yield from _container_privileges(pod.name, container)
    options = cluster_spec(document).get("autoscalerOptions", {})
    yield from _container_privileges("autoscaler", options)


def _container_privileges(name: str, container: Document) -> Iterator[str]:
    security = container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        yield f"{name}: may gain privileges"
    if security.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{name}: keeps capabilities"
    if not security.get("readOnlyRootFilesystem"):
        yield f"{name}: can write to its image"


def volumes_are_mounted(document: Document) -> Iterator[str]:
    for pod in pods(document):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        mounts = {
            m["mountPath"]: m["name"]
            for container in pod.spec["containers"]
            for m in container.get("volumeMounts", [])
        }
        if set(mounts.values()) != set(volumes):
            yield f"{pod.name}: volumes {sorted(volumes)}, mounts {sorted(mounts.values())}"
        if pod.role == "submitter":
            continue
        shared = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
        memory = quantity(pod.ray_container["resources"]["limits"]["memory"])
        if shared.get("medium") != "Memory" or quantity(shared.get("sizeLimit", 0)) * 2 > memory:
            yield f"{pod.name}: /dev/shm must be memory, at most half of the limit"


def autoscaler_can_write(document: Document) -> Iterator[str]:
    head = next(pods(document, "head"))
    options = cluster_spec(document).get("autoscalerOptions", {})
    mounted = {mount["mountPath"]: mount["name"] for mount in options.get("volumeMounts", [])}
    if mounted.get("/tmp") not in {volume["name"] for volume in head.spec.get("volumes", [])}:
        yield "the autoscaler's image is read-only: mount a volume of the head at /tmp"


def nothing_is_secret(document: Document) -> Iterator[str]:
    for pod in pods(document):
        for container in pod.spec["containers"]:
            for entry in container.get("env", []):
                if _SECRET_NAME.search(entry["name"]) and "value" in entry:
                    yield f"{pod.name}: {entry['name']} is written out"
    if cluster_spec(document).get("authOptions", {}).get("mode") != "token":
        yield "Ray accepts anybody: authOptions.mode must be token"


def kueue_admits(document: Document) -> Iterator[str]:
    metadata = document["metadata"]
    if "kueue.x-k8s.io/queue-name" not in metadata.get("labels", {}):
        return
    elastic = metadata.get("annotations", {}).get("kueue.x-k8s.io/elastic-job") == "true"
    if cluster_spec(document).get("enableInTreeAutoscaling") and not elastic:
        yield "Kueue takes the autoscaler only with kueue.x-k8s.io/elastic-job"
    if document["kind"] == "RayJob" and not document["spec"].get("shutdownAfterJobFinishes"):
        yield "Kueue takes a RayJob only with shutdownAfterJobFinishes"


RULES: tuple[Rule, ...] = (
    names_fit,
    replicas_are_ordered,
    resources_are_bounded,
    versions_agree,
    autoscaler_is_v2,
    gcs_fault_tolerance_has_one_source,
    drains_end_before_the_kill,
    head_only_leads,
    spot_has_a_fallback,
    workers_agree_with_configuration,
    entrypoint_is_accepted,
    job_ends_and_cleans_up,
    pods_have_no_privileges,
    volumes_are_mounted,
    autoscaler_can_write,
    nothing_is_secret,
    kueue_admits,
)
"""All rules."""


def broken_rules(document: Document) -> list[str]:
    """Every complaint, with the rule's name before it."""
    return [f"{rule.__name__}: {line}" for rule in RULES for line in rule(document)]
