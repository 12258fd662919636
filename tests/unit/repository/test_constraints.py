"""constraints.txt pins everything that an installation brings, and only by version."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
LINE = re.compile(r"([A-Za-z0-9._-]+)==([0-9][0-9a-zA-Z.]*)")


def pins() -> dict[str, str]:
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = LINE.fullmatch(line)
            assert match, f"not a plain pin: {line}"
            found[canonicalize_name(match[1])] = match[2]
    return found


def project_requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    texts = [*project["dependencies"], *itertools.chain(*extras)]
    return [each for each in map(Requirement, texts) if each.name != project["name"]]


def unpinned(python_version: str) -> set[str]:
    """Names in the closure of the project's requirements that have no pin."""
    environment = {
        **{key: str(value) for key, value in default_environment().items()},
        "python_version": python_version,
        "python_full_version": f"{python_version}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
    }
    known, missing = pins(), set()
    queue = [(requirement, "") for requirement in project_requirements()]
    seen: set[tuple[str, str]] = set()
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker and not requirement.marker.evaluate({**environment, "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name not in known:
            missing.add(name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                needs = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            queue += [(Requirement(text), wanted) for text in needs]
    return missing


def test_constraints_hold_plain_pins_only() -> None:
    assert len(pins()) > 50


@pytest.mark.parametrize("python_version", ["3.11", "3.12"])
def test_constraints_pin_everything_that_is_installed(python_version: str) -> None:
    assert unpinned(python_version) == set()


def test_constraints_satisfy_the_project() -> None:
    known = pins()
    for requirement in project_requirements():
        version = known[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_constraints_pin_torch_and_the_torchvision_built_for_it() -> None:
    if importlib.metadata.version("torchvision").partition("+")[0] != pins()["torchvision"]:
        pytest.fail("the installed torchvision is not the pinned one")
    needs = [Requirement(text) for text in importlib.metadata.requires("torchvision") or []]
    torch = next(requirement for requirement in needs if requirement.name == "torch")
    assert torch.specifier.contains(pins()["torch"])


def test_lock_with_hashes_has_the_same_versions() -> None:
    text = (ROOT / ".ci" / "requirements.lock").read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^ ;]+)", text, re.MULTILINE))
    known = pins()
    assert len(locked) > 50
    differing = {name for name, version in locked.items() if known.get(name, version) != version}
    assert differing == set(), "run `make lock`"
