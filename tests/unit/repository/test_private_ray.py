"""Private parts of Ray are imported in one module and, tests apart, nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ALLOWED = ROOT / "platform" / "elastic_kfac" / "cluster" / "ray" / "internals.py"
PRIVATE = (
    "ray.core.generated",
    "ray.cluster_utils",
    "ray.autoscaler",
    "ray.dashboard",
    "ray.experimental",
)
"""Besides every module of Ray with a part that begins with an underscore."""


def private_names(source: str) -> list[str]:
    """Private modules of Ray that a module imports or reaches by attribute."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        found += [name for name in names if _is_private(name)]
    return found


def _is_private(name: str) -> bool:
    first, *rest = name.split(".")
    if first != "ray" or name == "ray.__version__":
        return False
    return any(part.startswith("_") for part in rest) or name.startswith(PRIVATE)


@pytest.mark.parametrize("folder", ["platform", "jobs", "benchmarks"])
def test_private_ray_is_used_in_one_module(folder: str) -> None:
    found = {
        str(path.relative_to(ROOT)): names
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != ALLOWED and (names := private_names(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_the_check_sees_imports_and_attributes() -> None:
    source = """
import ray._raylet
import ray.train
from ray._private import worker
from ray.train.v2._internal.execution import callback
from ray import cluster_utils
ray._private.worker.global_worker
ray.__version__
"""
    assert len(set(private_names(source))) >= 5
    assert "ray.__version__" not in private_names(source)
    assert private_names(ALLOWED.read_text(encoding="utf-8"))
