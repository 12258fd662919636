"""Disruption budgets, network policies, monitors, accounts and the image fit the Ray manifests."""

from __future__ import annotations

import re
from typing import Any

import pytest

from deployment.manifests import (
    K8S,
    ROOT,
    documents,
    groups,
    image_tag,
    manifest_files,
    pods,
    ray_manifests,
)
from deployment.rules import HEAD_PORTS

OBJECTS = [
    document
    for path in manifest_files()
    for document in documents(path)
    if isinstance(document, dict) and "kind" in document
]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for document in OBJECTS if document["kind"] == kind]


def pod_labels() -> list[dict[str, str]]:
    """Labels of every Ray pod, with those that the operator adds."""
    return [
        {**pod.template["metadata"]["labels"], "ray.io/node-type": pod.role}
        for _, document in ray_manifests()
        for pod in pods(document, "head", "worker")
    ]


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector takes a pod.

    Raises:
        ValueError: For an operator that is not used here.
    """
    for expression in selector.get("matchExpressions", []):
        if expression["operator"] != "In":
            raise ValueError(expression["operator"])
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


@pytest.mark.parametrize("folder", [folder for folder, _ in ray_manifests()])
def test_budgets_protect_the_head_and_one_worker_of_each_job(folder: str) -> None:
    (document,) = (d for name, d in ray_manifests() if name == folder)
    budgets = documents(K8S / "base" / folder / "disruption.yaml")
    instance = document["metadata"]["name"]
    for pod in pods(document, "head", "worker"):
        labels = {**pod.template["metadata"]["labels"], "ray.io/node-type": pod.role}
        assert labels["app.kubernetes.io/instance"] == instance
        assert sum(selects(budget["spec"]["selector"], labels) for budget in budgets) == 1
    fewest = max(1, sum(group["minReplicas"] for group in groups(document)))
    for budget in budgets:
        # Percentages and maxUnavailable need a controller with a scale subresource.
        assert set(budget["spec"]) == {"minAvailable", "selector"}
        assert isinstance(budget["spec"]["minAvailable"], int)
        assert 1 <= budget["spec"]["minAvailable"] <= fewest


def test_budgets_of_one_job_leave_the_pods_of_another_alone() -> None:
    for budget in of_kind("PodDisruptionBudget"):
        taken = [labels for labels in pod_labels() if selects(budget["spec"]["selector"], labels)]
        assert len({labels["app.kubernetes.io/instance"] for labels in taken}) == 1


def test_network_policy_covers_every_pod_both_ways() -> None:
    (policy,) = (p for p in of_kind("NetworkPolicy") if p["metadata"]["name"] == "elastic-kfac")
    spec = policy["spec"]
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    submitters = [
        pod.template["metadata"]["labels"]
        for _, document in ray_manifests()
        for pod in pods(document, "submitter")
    ]
    for labels in [*pod_labels(), *submitters]:
        assert selects(spec["podSelector"], labels)
        assert any(
            selects(peer.get("podSelector", {"matchLabels": {"none": ""}}), labels)
            for rule in spec["ingress"]
            for peer in rule["from"]
        )
    assert all(rule.get("from") for rule in spec["ingress"]), "open to everybody"
    outside = [rule for rule in spec["ingress"] if "ports" not in rule]
    assert all("namespaceSelector" not in peer for rule in outside for peer in rule["from"])


def test_network_policy_opens_the_ports_that_are_scraped() -> None:
    policies = of_kind("NetworkPolicy")
    opened = {
        port["port"]
        for policy in policies
        for rule in policy["spec"].get("ingress", [])
        for port in rule.get("ports", [])
    }
    (monitor,) = of_kind("PodMonitor")
    scraped = {HEAD_PORTS[e["port"]] for e in monitor["spec"]["podMetricsEndpoints"]}
    assert scraped == {8080, 44217, 44227}
    assert opened == scraped | {HEAD_PORTS["dashboard"]}


def test_monitor_selects_ray_pods_and_nothing_else() -> None:
    (monitor,) = of_kind("PodMonitor")
    selector = monitor["spec"]["selector"]
    assert all(selects(selector, labels) for labels in pod_labels())
    redis = {"app.kubernetes.io/part-of": "elastic-kfac", "app.kubernetes.io/component": "redis"}
    assert not selects(selector, redis)


def test_accounts_that_pods_name_exist_and_give_workers_no_token() -> None:
    accounts = {account["metadata"]["name"]: account for account in of_kind("ServiceAccount")}
    for _, document in ray_manifests():
        for pod in pods(document, "head", "worker"):
            account = accounts[pod.spec["serviceAccountName"]]
            assert account["automountServiceAccountToken"] is (pod.role == "head")
    assert not {d["kind"] for d in OBJECTS} & {"ClusterRole", "ClusterRoleBinding", "Role"}


def test_redis_takes_its_password_from_the_secret_that_ray_uses() -> None:
    (redis,) = of_kind("StatefulSet")
    container = redis["spec"]["template"]["spec"]["containers"][0]
    (password,) = container["env"]
    (operation,) = documents(K8S / "components" / "gcs-fault-tolerance" / "patch.yaml")[0]
    assert operation["value"]["redisPassword"]["valueFrom"] == password["valueFrom"]
    host, _, port = operation["value"]["redisAddress"].partition(":")
    (service,) = (d for d in of_kind("Service") if d["metadata"]["name"] == host)
    assert service["spec"]["ports"][0]["port"] == int(port)
    assert selects({"matchLabels": service["spec"]["selector"]}, _labels_of(redis))
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert redis["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"] is True


def _labels_of(workload: dict[str, Any]) -> dict[str, str]:
    labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels


def test_claim_that_pods_mount_exists_and_is_shared() -> None:
    (claim,) = of_kind("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for _, document in ray_manifests():
        for pod in pods(document, "head", "worker"):
            names = [
                volume["persistentVolumeClaim"]["claimName"]
                for volume in pod.spec["volumes"]
                if "persistentVolumeClaim" in volume
            ]
            assert names == [claim["metadata"]["name"]]


def test_queues_are_the_ones_that_jobs_ask_for() -> None:
    kueue = documents(K8S / "components" / "kueue" / "patch.yaml")[0]
    volcano = documents(K8S / "components" / "volcano" / "patch.yaml")[0]
    (local,), (queue,) = of_kind("LocalQueue"), of_kind("Queue")
    assert kueue[0]["value"] == local["metadata"]["name"]
    assert volcano[0]["value"] == queue["metadata"]["name"]
    (cluster_queue,) = of_kind("ClusterQueue")
    assert local["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    flavors = {flavor["metadata"]["name"] for flavor in of_kind("ResourceFlavor")}
    group = cluster_queue["spec"]["resourceGroups"][0]
    assert {flavor["name"] for flavor in group["flavors"]} == flavors
    listed = [entry["name"] for entry in group["flavors"][0]["resources"]]
    assert listed == group["coveredResources"]


def test_image_is_pinned_small_and_not_root() -> None:
    text = (K8S / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert f"elastic-kfac:{image_tag()}" in text
    assert lines[-2] == "USER 1000:1000"
    assert all("-c constraints.txt" in line for line in lines if "pip install" in line)
    (base,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", text, re.MULTILINE)
    # Debian 12: its bash lets `ray start` become process 1, which the drain on SIGTERM needs.
    assert re.fullmatch(r"python:3\.1[12]-slim-bookworm", base)
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE)
    wanted = {name for names in copied for name in names.split()}
    ignore = (K8S / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert wanted == {line[1:] for line in ignore if line.startswith("!")}
    assert all((ROOT / name).exists() for name in wanted)
    assert "ADD " not in text


def test_selectors_work_both_ways() -> None:
    selector = {"matchExpressions": [{"key": "a", "operator": "In", "values": ["1"]}]}
    assert selects(selector, {"a": "1"})
    assert not selects(selector, {"a": "2"})
    assert not selects({"matchLabels": {"b": "1"}}, {"a": "1"})
    with pytest.raises(ValueError, match="NotIn"):
        selects({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": []}]}, {})
