"""The YAML files of k8s/ as the tests see them: documents, job settings, pod templates, quantities."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from elastic_kfac import __version__
from elastic_kfac.cli.arguments import parse_arguments
from elastic_kfac.cli.entry import job_arguments
from elastic_kfac.config import Config, read_config

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
RAY_KINDS = ("RayJob", "RayCluster")
_SUFFIXES = {"m": Fraction(1, 1000), "": Fraction(1), "k": Fraction(1000)} | {
    f"{letter}i": Fraction(1024**power) for power, letter in enumerate("KMGT", start=1)
}


def documents(path: Path) -> list[dict[str, Any]]:
    """All documents of a YAML file."""
    return [d for d in yaml.safe_load_all(path.read_text(encoding="utf-8")) if d is not None]


def manifest_files() -> list[Path]:
    """Every YAML file of k8s/."""
    return sorted(K8S.rglob("*.yaml"))


def ray_manifests() -> list[tuple[str, dict[str, Any]]]:
    """Every complete RayJob and RayCluster, with the folder that it is in."""
    return [
        (path.parent.name, document)
        for path in sorted((K8S / "base").rglob("*.yaml"))
        for document in documents(path)
        if document.get("kind") in RAY_KINDS
    ]


def quantity(text: str | int) -> Fraction:
    """A Kubernetes quantity as a number.

    Raises:
        ValueError: If it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]*)", str(text))
    if match is None or match[2] not in _SUFFIXES:
        raise ValueError(f"not a quantity: {text}")
    return Fraction(match[1]) * _SUFFIXES[match[2]]


@functools.cache
def pinned(package: str) -> str:
    """The version that constraints.txt pins."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    match = re.search(rf"^{re.escape(package)}==(\S+)$", text, re.MULTILINE)
    assert match, f"{package} is not pinned"
    return match[1]


def image_tag() -> str:
    """The tag of images of this version."""
    return f"{__version__}-ray{pinned('ray')}"


@functools.cache
def image_root() -> str:
    """Where the image keeps the repository."""
    text = (K8S / "Dockerfile").read_text(encoding="utf-8")
    return re.findall(r"^WORKDIR (\S+)$", text, re.MULTILINE)[-1]


@dataclass(frozen=True)
class Pod:
    """A pod template and what it is for."""

    role: str
    """`head`, `worker` or `submitter`."""
    name: str
    template: dict[str, Any]

    @property
    def spec(self) -> dict[str, Any]:
        return self.template["spec"]

    @property
    def ray_container(self) -> dict[str, Any]:
        return self.spec["containers"][0]

    @property
    def environment(self) -> dict[str, Any]:
        return {entry["name"]: entry.get("value") for entry in self.ray_container.get("env", [])}


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    """The RayCluster's spec, which a RayJob carries inside."""
    spec = document["spec"]
    return spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec


def groups(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The worker groups."""
    return cluster_spec(document).get("workerGroupSpecs", [])


def pods(document: dict[str, Any], *roles: str) -> Iterator[Pod]:
    """The pod templates of a manifest; all, or those of some roles."""
    found = [Pod("head", "head", cluster_spec(document)["headGroupSpec"]["template"])]
    found += [Pod("worker", group["groupName"], group["template"]) for group in groups(document)]
    if "submitterPodTemplate" in document["spec"]:
        found.append(Pod("submitter", "submitter", document["spec"]["submitterPodTemplate"]))
    return (pod for pod in found if not roles or pod.role in roles)


def workers_per_pod(group: dict[str, Any], config: Config) -> int:
    """How many training workers Ray can place on one pod of a group."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    offered = {
        "CPU": Fraction(group.get("rayStartParams", {}).get("num-cpus", quantity(limits["cpu"]))),
        "GPU": quantity(limits.get("nvidia.com/gpu", 0)),
    }
    wanted = dict(config.resources.per_worker)
    if config.resources.use_gpu:
        wanted.setdefault("GPU", 1.0)
    return min(int(offered.get(name, Fraction(0)) / Fraction(n)) for name, n in wanted.items())


@dataclass(frozen=True)
class Training:
    """What an entrypoint asks for."""

    config: Config
    name: str | None
    storage: str


def training(entrypoint: str) -> Training:
    """Reads an entrypoint with the program's own grammar.

    Raises:
        UsageError: If the command line would be refused.
        ConfigError: If the configuration would be refused.
        ValueError: If it is no command of the image.
    """
    python, script, *words = shlex.split(entrypoint)
    path = _in_repository(script)
    if python != "python" or path != ROOT / "jobs" / "train.py":
        raise ValueError(f"not a training job: {python} {script}")
    arguments = parse_arguments(job_arguments("train", words, {}))
    config = read_config(_in_repository(arguments.config), arguments.overrides)
    return Training(config, arguments.name, arguments.storage)


def _in_repository(path: str) -> Path:
    if not path.startswith(f"{image_root()}/"):
        raise ValueError(f"{path} is not in the image ({image_root()})")
    return ROOT / path.removeprefix(f"{image_root()}/")
