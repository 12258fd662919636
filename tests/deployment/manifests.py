"""The YAML files of k8s/ as the tests see them: documents, job settings, pod templates, quantities."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from elastic_kfac import __version__
from elastic_kfac.cli import main
from elastic_kfac.cli.arguments import parse_arguments
from elastic_kfac.cli.entry import job_arguments
from elastic_kfac.config import Config, read_config
from elastic_kfac.experiments.search_space import read_space
from elastic_kfac.experiments.study import load_study

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
class Asked:
    """What an entrypoint asks for."""

    places: tuple[str, ...]
    """Where it reads and writes."""
    name: str | None = None
    config: Config | None = None
    """Of a run, a trial or a cell; None where nothing is trained."""
    least: int = 1
    most: int | None = None
    """Workers that it can use at the same time; None is any number."""


def asked(entrypoint: str) -> Asked:
    """Reads an entrypoint with the program's own grammar.

    Raises:
        UsageError: If the command line would be refused.
        ConfigError: If the configuration would be refused.
        ValueError: If it is no command of the image.
    """
    python, script, *words = shlex.split(entrypoint)
    path = _in_image(script)
    if python != "python" or path.parent != ROOT / "jobs" or path.stem not in _COMMANDS:
        raise ValueError(f"not a job: {python} {script}")
    arguments = parse_arguments(job_arguments(_COMMANDS[path.stem], words, {}))
    if path.stem == "make_shards":
        source = arguments.source.partition(":")[2]
        return Asked((arguments.out, *([source] if source.startswith("/") else [])), "shards")
    if path.stem == "train":
        config = read_config(_in_image(arguments.config), arguments.overrides)
        elastic = config.elastic
        least, most = elastic.min_workers, elastic.max_workers
    elif path.stem == "tune":
        space = read_space(_in_image(arguments.space), arguments.overrides)
        config, elastic = space.base, space.base.elastic
        least, most = elastic.min_workers, elastic.max_workers * space.max_concurrent
    else:
        study = load_study(_in_image(arguments.study), arguments.overrides)
        config, least, most = study.cells[0].config, 1, study.study.parallelism
    places = (arguments.storage, config.data.shards)
    return Asked(places, arguments.name, config, least, most)


_COMMANDS = {
    "train": "train",
    "tune": "tune",
    "compare": "compare",
    "make_shards": "shards make",
}


def _in_image(path: str) -> Path:
    """The file of the repository, or of a project as `init` writes it, that the image has at a path."""
    if path.startswith(f"{image_root()}/"):
        return ROOT / path.removeprefix(f"{image_root()}/")
    if path.startswith("/srv/project/"):
        return own_project() / path.removeprefix("/srv/project/")
    raise ValueError(f"{path} is not in the image ({image_root()})")


@functools.cache
def own_project() -> Path:
    """A project as `elastic-kfac init` writes it."""
    folder = Path(tempfile.mkdtemp(prefix="own-project-")) / "my_project"
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["init", str(folder)]) == 0
    return folder
