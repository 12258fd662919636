"""The kustomize tree: files that exist, patches that apply to the base, and rendered overlays."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployment.custom_resources import pointer_tokens, problems, problems_of_part
from deployment.manifests import K8S, RAY_KINDS, ROOT, documents, image_tag, manifest_files, pods
from deployment.rules import broken_rules

KUSTOMIZATIONS = sorted(K8S.rglob("kustomization.yaml"))
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
SAME_JOB = (
    {"gpu-on-demand", "gpu-fault-tolerant", "gpu-kueue", "gpu-volcano"},
    {"gpu-spot", "gpu-spot-s3"},
)
"""Variants of one job, of which one is applied at a time."""
FIELDS = {"apiVersion", "kind", "namespace", "resources", "components", "patches"}
FIELDS |= {"configMapGenerator", "generatorOptions"}


def patch_files() -> list[Path]:
    return [
        path.parent / patch["path"]
        for path in KUSTOMIZATIONS
        for patch in documents(path)[0].get("patches", [])
    ]


def missing_parts(path: Path) -> list[str]:
    """What a kustomization names and is not there, or is there and nobody names."""
    content = documents(path)[0]
    named = [*content.get("resources", []), *content.get("components", [])]
    named += [patch["path"] for patch in content.get("patches", [])]
    lost = [f"{name} is missing" for name in named if not (path.parent / name).exists()]
    lost += [
        f"{name} has no kustomization"
        for name in named
        if (path.parent / name).is_dir() and not (path.parent / name / path.name).exists()
    ]
    present = {file.name for file in path.parent.glob("*.yaml")} - {path.name}
    return lost + [f"{name} is used by nobody" for name in present - set(named)]


def dangling(operation: dict[str, Any], document: dict[str, Any]) -> str | None:
    """Why a patch operation would fail on a document, None when it fits."""
    *parents, last = pointer_tokens(operation["path"])
    node: Any = document
    for token in parents:
        try:
            node = node[int(token) if isinstance(node, list) else token]
        except (KeyError, IndexError, ValueError):
            return f"{operation['path']}: there is no {token}"
    exists = int(last) < len(node) if isinstance(node, list) else last in node
    if operation["op"] in ("remove", "replace") and not exists:
        return f"{operation['path']}: nothing to {operation['op']}"
    return None


def applied(operations: list[dict[str, Any]], document: dict[str, Any]) -> dict[str, Any]:
    """A document after a JSON patch of `add`, `replace` and `remove`."""
    result = copy.deepcopy(document)
    for operation in operations:
        assert dangling(operation, result) is None
        *parents, last = pointer_tokens(operation["path"])
        node: Any = result
        for token in parents:
            node = node[int(token) if isinstance(node, list) else token]
        key = int(last) if isinstance(node, list) else last
        if operation["op"] == "remove":
            del node[key]
        else:
            node[key] = copy.deepcopy(operation["value"])
    return result


def objects_of(folder: Path) -> list[dict[str, Any]]:
    """What a kustomization makes of its resources, as far as this tree uses kustomize."""
    content = documents(folder / "kustomization.yaml")[0]
    found: list[dict[str, Any]] = []
    for name in content.get("resources", []):
        path = folder / name
        found += objects_of(path) if path.is_dir() else documents(path)
    patches = [(folder, patch) for patch in content.get("patches", [])]
    for name in content.get("components", []):
        component = documents(folder / name / "kustomization.yaml")[0]
        patches += [(folder / name, patch) for patch in component.get("patches", [])]
        found += [
            d for part in component.get("resources", []) for d in documents(folder / name / part)
        ]
    for place, patch in patches:
        kind, called = patch["target"]["kind"], patch["target"].get("name")
        (operations,) = documents(place / patch["path"])
        hit = [d for d in found if d["kind"] == kind and called in (None, d["metadata"]["name"])]
        assert hit, f"{place / patch['path']} fits nothing"
        changed = [applied(operations, d) for d in hit]
        found = [d for d in found if d not in hit] + changed
    return found


def base_of(patch: Path) -> list[dict[str, Any]]:
    """The objects that a patch is applied to: those of the overlays that name its folder."""
    targets = [
        entry["target"]
        for path in KUSTOMIZATIONS
        if path.parent == patch.parent
        for entry in documents(path)[0].get("patches", [])
        if entry["path"] == patch.name
    ]
    overlays = [path for path in KUSTOMIZATIONS if path.parent.parent.name == "overlays"]
    users = [
        path
        for path in overlays
        if path.parent == patch.parent
        or f"../../components/{patch.parent.name}" in documents(path)[0].get("components", [])
    ]
    return [
        document
        for path in users
        for base in documents(path)[0]["resources"]
        for file in (path.parent / base).glob("*.yaml")
        for document in documents(file)
        if any(
            document["kind"] == target["kind"]
            and target.get("name") in (None, document["metadata"]["name"])
            for target in targets
        )
    ]


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda p: str(p.parent.relative_to(K8S)))
def test_kustomization_names_what_is_there(path: Path) -> None:
    content = documents(path)[0]
    assert set(content) <= FIELDS
    assert missing_parts(path) == []


def test_missing_and_unused_files_are_seen(tmp_path: Path) -> None:
    (tmp_path / "extra.yaml").write_text("kind: A")
    (tmp_path / "kustomization.yaml").write_text("resources: [gone.yaml]")
    found = missing_parts(tmp_path / "kustomization.yaml")
    assert found == ["gone.yaml is missing", "extra.yaml is used by nobody"]


@pytest.mark.parametrize("path", patch_files(), ids=lambda p: str(p.relative_to(K8S)))
def test_patch_fits_its_base_and_the_schema(path: Path) -> None:
    bases = base_of(path)
    assert bases, "nobody uses this patch"
    for document in bases:
        patched = copy.deepcopy(document)
        for operation in documents(path)[0]:
            assert set(operation) <= {"op", "path", "value"}
            assert dangling(operation, patched) is None
            is_ray = document["kind"] in RAY_KINDS
            if is_ray and "value" in operation and not operation["path"].startswith("/metadata/"):
                assert problems_of_part("RayJob", operation["path"], operation["value"]) == []


def test_patch_checks_see_what_would_not_apply() -> None:
    document = {"spec": {"list": [1]}}
    assert dangling({"op": "remove", "path": "/spec/list/1"}, document)
    assert dangling({"op": "add", "path": "/spec/none/a"}, document)
    assert dangling({"op": "add", "path": "/spec/new"}, document) is None
    cluster = "/spec/rayClusterSpec"
    assert problems_of_part("RayJob", f"{cluster}/gcsFaultTolerance", {})
    assert problems_of_part("RayJob", f"{cluster}/gcsFaultToleranceOptions", {"redisAdress": "a"})
    assert problems_of_part("RayJob", "/spec/suspend", "yes")
    assert problems_of_part("RayJob", f"{cluster}/workerGroupSpecs/0/maxReplicas", 3) == []


def test_no_file_holds_a_secret() -> None:
    for path in manifest_files():
        for document in documents(path):
            assert not (isinstance(document, dict) and document.get("kind") == "Secret"), path


def test_every_overlay_is_in_the_readme() -> None:
    readme = (K8S / "README.md").read_text(encoding="utf-8")
    assert [name for name in OVERLAYS if f"`overlays/{name}`" not in readme] == []


@pytest.mark.parametrize("page", ["k8s/README.md", "docs/kubernetes.md"])
def test_commands_of_the_pages_name_what_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    commands = re.findall(r"^(?:kubectl|\(cd k8s|docker|kind) .*$", text, re.MULTILINE)
    assert len(commands) > 9
    for command in commands:
        places = re.findall(r"(?:-k|-f|kustomize|\(cd) (k8s/\S+)", command)
        assert all((ROOT / place).exists() for place in places), command
        # kubectl takes one kustomization at a time, the last.
        assert command.count(" -k ") <= 1, command
    assert set(re.findall(r"elastic-kfac:([\w.-]+)", text)) == {image_tag()}
    jobs = set(re.findall(r"job/(kfac-[\w-]+)", text))
    known = {
        d["metadata"]["name"]
        for overlay in OVERLAYS
        for d in objects_of(K8S / "overlays" / overlay)
    }
    assert jobs and jobs <= known


def rendered(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of a folder; needs no cluster and no network."""
    kubectl = shutil.which("kubectl")
    assert kubectl, "these tests need kubectl 1.27 or newer"
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@pytest.mark.tools
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rendered_overlay_fits_schema_and_rules(overlay: str) -> None:
    found = rendered(K8S / "overlays" / overlay)
    workloads = [document for document in found if document["kind"] in RAY_KINDS]
    assert len(workloads) == 1
    for document in workloads:
        assert problems(document) == []
        assert broken_rules(document) == []
    assert {document["metadata"]["namespace"] for document in found} == {"elastic-kfac"}


def contained(folder: Path) -> set[tuple[str, str]]:
    """(kind, name) of everything that a kustomization applies, bases and components included."""
    return {(each["kind"], each["metadata"]["name"]) for each in objects_of(folder)}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_fits_schema_and_rules(overlay: str) -> None:
    found = objects_of(K8S / "overlays" / overlay)
    (workload,) = (document for document in found if document["kind"] in RAY_KINDS)
    assert problems(workload) == []
    assert broken_rules(workload) == []
    budgets = [document for document in found if document["kind"] == "PodDisruptionBudget"]
    assert len(budgets) == 2
    instance = workload["metadata"]["name"]
    for pod in pods(workload):
        assert pod.template["metadata"]["labels"]["app.kubernetes.io/instance"] == instance
    for budget in budgets:
        labels = budget["spec"]["selector"]["matchLabels"]
        assert labels["app.kubernetes.io/instance"] == instance
        assert budget["metadata"]["name"] == f"{instance}-{labels['ray.io/node-type']}"


def test_every_command_of_a_cluster_has_a_job() -> None:
    scripts = set()
    for overlay in OVERLAYS:
        for document in objects_of(K8S / "overlays" / overlay):
            if document["kind"] == "RayJob":
                scripts.add(document["spec"]["entrypoint"].split()[1].rpartition("/")[2])
    assert scripts == {path.name for path in (ROOT / "jobs").glob("*.py")}


def test_deleting_an_overlay_leaves_what_others_use() -> None:
    once = {name: contained(K8S / name) for name in ("foundation", "storage", "monitoring")}
    assert {kind for kind, _ in set().union(*once.values())} == {
        *("ServiceAccount", "NetworkPolicy", "PersistentVolumeClaim"),
        *("PodMonitor", "PrometheusRule"),
    }
    held = {overlay: contained(K8S / "overlays" / overlay) for overlay in OVERLAYS}
    for overlay, objects in held.items():
        same = next((group for group in SAME_JOB if overlay in group), {overlay})
        others = [name for name in OVERLAYS if name not in same]
        rest = set().union(*once.values(), *(held[name] for name in others))
        assert objects and objects.isdisjoint(rest), overlay


def test_runbook_names_every_alert() -> None:
    (rules,) = documents(K8S / "monitoring" / "prometheus-rule.yaml")
    alerts = [r["alert"] for g in rules["spec"]["groups"] for r in g["rules"] if "alert" in r]
    readme = (K8S / "README.md").read_text(encoding="utf-8")
    assert len(alerts) > 3
    assert [alert for alert in alerts if f"| `{alert}` |" not in readme] == []


def test_image_of_ones_own_code_is_made_from_the_pinned_one() -> None:
    text = (K8S / "own-code" / "Dockerfile").read_text(encoding="utf-8")
    assert text.count(f"elastic-kfac:{image_tag()}") == 2
    assert "FROM ${BASE}" in text
    base = (K8S / "Dockerfile").read_text(encoding="utf-8")
    (path,) = re.findall(r"PYTHONPATH=(\S+)", base)
    assert f"PYTHONPATH={path}:/srv/project" in text


@pytest.mark.tools
@pytest.mark.parametrize("part", ["foundation", "storage", "monitoring"])
def test_rendered_part_is_in_the_namespace(part: str) -> None:
    found = rendered(K8S / part)
    assert {(d["kind"], d["metadata"]["name"]) for d in found} == contained(K8S / part)
    assert {document["metadata"]["namespace"] for document in found} == {"elastic-kfac"}


@pytest.mark.tools
def test_rendered_queues_reach_the_job() -> None:
    def job(overlay: str) -> dict[str, Any]:
        (found,) = (d for d in rendered(K8S / "overlays" / overlay) if d["kind"] == "RayJob")
        return found

    kueue, volcano = job("gpu-kueue"), job("gpu-volcano")
    assert kueue["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "elastic-kfac"
    assert kueue["spec"]["suspend"] is True
    assert volcano["metadata"]["labels"]["volcano.sh/queue-name"] == "elastic-kfac"
    assert "gcsFaultToleranceOptions" in job("gpu-fault-tolerant")["spec"]["rayClusterSpec"]
    assert "--storage s3://" in job("gpu-spot-s3")["spec"]["entrypoint"]


@pytest.mark.tools
def test_image_can_be_renamed_everywhere(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    overlay = tmp_path / "k8s" / "overlays" / "gpu-on-demand"
    with (overlay / "kustomization.yaml").open("a", encoding="utf-8") as file:
        file.write("images:\n  - name: elastic-kfac\n    newName: example.org/elastic-kfac\n")
    text = yaml.safe_dump(rendered(overlay))
    assert f"image: elastic-kfac:{image_tag()}" not in text
    assert text.count(f"example.org/elastic-kfac:{image_tag()}") == 3


@pytest.mark.tools
def test_dashboards_render_as_config_maps() -> None:
    found = rendered(ROOT / "dashboards")
    assert {d["kind"] for d in found} == {"ConfigMap"}
    assert len(found) == 3
