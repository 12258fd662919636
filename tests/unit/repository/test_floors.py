"""House rules that no linter checks: floors, names, and what must stay out of tracked files."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.house import PACKAGE, ROOT, tracked_files

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("paths", "json_text", "host"),
    ("config",),
    ("curvature", "communication", "placement", "observability", "data", "zoo"),
    ("optimizers", "kfac", "state"),
    ("tasks",),
    ("analysis",),
    ("training.sync",),
    ("training",),
    ("elastic", "checkpoints", "runs"),
    ("cluster.ray",),
    ("cluster.run",),
    ("cluster",),
    ("experiments",),
    ("reports",),
    ("cli",),
    ("__main__",),
)
"""From the ground up: a room imports rooms of lower floors, and its own modules."""
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
UPWARD: set[str] = set()
"""Arrows that do not go down yet; the test fails when one of them is gone and still listed."""
FORBIDDEN_PACKAGES = {
    "curvature": {"torchvision", "torchmetrics", "ray"},
    "communication": {"torchvision", "torchmetrics", "ray"},
    "placement": {"torch", "torchvision", "torchmetrics", "ray"},
    "data": {"ray"},
    **{room: {"ray"} for room in ("kfac", "optimizers", "state", "tasks", "zoo", "analysis")},
    **{room: {"ray"} for room in ("training", "runs", "observability")},
    **{room: {"ray"} for room in ("elastic", "checkpoints")},
    "reports": {"torch", "torchvision", "ray"},
}
CORE = ("curvature", "communication", "placement", "data", "kfac", "optimizers", "state", "tasks")
CORE = (*CORE, "zoo", "analysis", "training", "training.sync", "runs")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The room of a module; single files are rooms of their own."""
    return room_of_name(list(path.relative_to(PACKAGE).with_suffix("").parts))


def room_of_name(parts: list[str]) -> str:
    """The room of a dotted name below the package: its longest prefix that is a room."""
    return next((r for r in (".".join(parts[:2]), parts[0]) if r in FLOOR_OF), parts[0])


def imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            if module == "elastic_kfac":
                yield from (f"{module}.{alias.name}" for alias in node.names)
            else:
                yield module


def violations(path: Path) -> list[str]:
    """Imports of a module that go up, sideways, or to a package its room must not know."""
    room, found = room_of(path), []
    for name in imported_names(path):
        parts = name.split(".")
        if parts[0] != "elastic_kfac":
            # A room below another one keeps its rules.
            if parts[0] in FORBIDDEN_PACKAGES.get(room.split(".")[0], set()):
                found.append(f"{room} imports {name}")
            continue
        target = room_of_name(parts[1:] or ["__version__"])
        if target in {room, "__version__"} or room == "__init__":
            continue
        if FLOOR_OF[target] >= FLOOR_OF[room]:
            found.append(f"{room} imports {target}")
    return found


def test_imports_only_go_down() -> None:
    assert {line for path in modules() for line in violations(path)} == UPWARD


def test_import_check_sees_an_upward_import(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "curvature").mkdir()
    module = tmp_path / "curvature" / "factors.py"
    module.write_text("import torch\nfrom elastic_kfac.training import loop\nimport ray.train\n")
    assert violations(module) == [
        "curvature imports training",
        "curvature imports ray.train",
    ]


def test_every_room_is_known() -> None:
    assert {room_of(path) for path in modules()} <= {*FLOOR_OF, "__init__"}


def test_source_root_is_not_a_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_core_imports_where_ray_is_not_installed() -> None:
    names = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in modules()
        if room_of(path) in CORE and path.name != "__init__.py"
    ]
    assert len(names) > 10
    code = (
        "import sys, importlib\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'ray': raise ImportError('ray is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "from elastic_kfac import KFAC\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'ray']\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_no_module_has_an_empty_name() -> None:
    vague = {"utils", "helpers", "common", "base", "manager", "misc"}
    assert [path for path in modules() if vague & set(path.with_suffix("").parts)] == []


def test_tracked_files_name_no_machine_and_no_registry() -> None:
    pattern = re.compile(
        r"(?<![\w.])/(?:work|home|root|Users|opt)/[\w.-]+"
        r"|--(?:extra-)?index-url[= ]+\S*://|--find-links"
        r"|https?://(?:[\w.-]*pypi[\w.-]*|download\.pytorch\.org|[\w.-]*artifactory[\w.-]*)"
    )
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if path == Path(__file__).resolve():
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert found == []


def test_top_level_holds_what_the_architecture_says() -> None:
    allowed = {"pyproject.toml", "README.md", "platform", "jobs", "tune_spaces", "tests"}
    allowed |= {"dashboards", "k8s", "Makefile", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md"}
    allowed |= {"constraints.txt", "benchmarks", "docs", "SECURITY.md", "CITATION.cff"}
    top = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_yaml_configurations_of_jobs_are_valid() -> None:
    from elastic_kfac.config import read_config

    files = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
    assert len(files) >= 2
    for path in files:
        read_config(path)


def test_makefile_targets_are_documented() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE))
    assert {
        "train",
        "test",
        "test-fast",
        "lint",
        "soak",
        "studies",
        "bench",
        "clean",
        "help",
    } <= targets
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())  # type: ignore[index]
    assert targets <= phony


def test_skip_list_has_reasons() -> None:
    entries = tomllib.loads((ROOT / "tests" / "skips.toml").read_text(encoding="utf-8"))["skip"]
    for entry in entries:
        assert set(entry) == {"test", "reason", "why"}
        assert entry["reason"].strip("*"), "a pattern that matches every reason allows everything"
