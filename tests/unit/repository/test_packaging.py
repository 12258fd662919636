"""What the package imports is what it declares, and a built wheel works without the checkout."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from elastic_kfac.cli.extras import _DISTRIBUTIONS
from support.house import ROOT, product

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
OPTIONAL = {"peft", "kfac"}
"""Never imported, only recognised."""


def declared(requirements: Iterable[str]) -> set[str]:
    return {Requirement(text).name for text in requirements} - {"elastic-kfac"}


def imported(tree: ast.Module, *, only_at_import: bool = False) -> set[str]:
    """Distributions that a module imports: anywhere, or when it is imported."""
    nodes = list(ast.walk(tree))
    if only_at_import:
        nodes = [inner for top in tree.body if not _is_lazy(top) for inner in ast.walk(top)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    tops = {name.partition(".")[0] for name in names} - {"elastic_kfac", ""}
    return {_DISTRIBUTIONS.get(top, top) for top in tops - set(sys.stdlib_module_names)}


def _is_lazy(node: ast.stmt) -> bool:
    guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    return guarded or isinstance(node, ast.FunctionDef | ast.ClassDef)


def test_every_import_is_declared_and_every_declaration_is_used() -> None:
    runtime = [extra for extra in EXTRAS if extra not in ("dev", "trainers")]
    known = declared(PROJECT["dependencies"]).union(*(declared(EXTRAS[e]) for e in runtime))
    found = set().union(*(imported(tree) for tree in product().values()))
    assert found == known


def test_undeclared_import_is_found() -> None:
    tree = ast.parse(
        "import os, numpy.linalg\ndef f():\n    from PIL import Image\nimport elastic_kfac"
    )
    assert imported(tree) == {"numpy", "pillow"}
    assert imported(tree, only_at_import=True) == {"numpy"}


def test_kfac_needs_torch_alone() -> None:
    assert declared(PROJECT["dependencies"]) == {"torch"}
    modules = {
        module for module, name in _DISTRIBUTIONS.items() if name in declared(EXTRAS["train"])
    }
    needed_by_torch = {"filelock", "jinja2", "markupsafe"}
    blocked = sorted((modules | set().union(*map(declared, EXTRAS.values()))) - needed_by_torch)
    installed = [f"{text}; extra == '{name}'" for name, all_ in EXTRAS.items() for text in all_]
    code = (
        "import importlib.metadata, sys\n"
        f"importlib.metadata.requires = lambda name: {installed!r}\n"
        f"for name in {blocked!r}:\n"
        "    sys.modules[name] = None\n"
        "import warnings; warnings.filterwarnings('ignore', 'Failed to initialize NumPy')\n"
        "import torch\n"
        "from elastic_kfac import KFAC, KFACOptimizer\n"
        "from elastic_kfac.cli import main\n"
        "net = torch.nn.Linear(3, 2)\n"
        "kfac = KFAC(net, lr=0.1, damping=1e-2)\n"
        "before = [p.clone() for p in net.parameters()]\n"
        "optimizer = torch.optim.SGD(net.parameters(), lr=0.1)\n"
        "for _ in range(3):\n"
        "    optimizer.zero_grad()\n"
        "    net(torch.randn(4, 3)).square().mean().backward()\n"
        "    kfac.step()\n"
        "    optimizer.step()\n"
        "assert not torch.equal(before[0], net.weight)\n"
        "KFAC(net, lr=0.1).load_state_dict(kfac.state_dict())\n"
        "KFACOptimizer(net, optimizer).zero_grad()\n"
        "assert main(['--version']) == 0\n"
        "for words in (['train', 'x.yaml'], ['tune', 'x.yaml'], ['doctor'], ['config', 'kfac']):\n"
        "    assert main(words) == 2, words\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 4, done.stderr
    assert all("which is not installed" in line for line in lines), lines


def _run(*command: str | Path, cwd: Path, expect: int = 0, quiet: bool = False) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == expect, (command, done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout if quiet else done.stdout + done.stderr


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_wheel_and_sdist_work_in_a_clean_environment(tmp_path: Path) -> None:
    """Installs `[tune]` from an index (several GB), then runs the commands outside the checkout."""
    _run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1  # The wheel was made from it.
    _run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    scripts = tmp_path / "venv" / "bin"
    pip = (scripts / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
    command = scripts / "elastic-kfac"
    _run(*pip, wheel, cwd=tmp_path)
    steps = (
        "import torch; from elastic_kfac import KFAC; net = torch.nn.Linear(3, 2); "
        "kfac = KFAC(net, lr=0.1); net(torch.randn(4, 3)).square().mean().backward(); kfac.step()"
    )
    _run(scripts / "python", "-c", steps, cwd=tmp_path)
    there = json.loads(_run(*pip[:3], "list", "--format=json", cwd=tmp_path, quiet=True))
    names = {each["name"].lower() for each in there}
    assert not names & {"numpy", "pydantic", "pyyaml", "ray", "matplotlib"}, names
    assert "pip install 'elastic-kfac[train]'" in _run(
        command, "train", "digits", "--local", cwd=tmp_path, expect=2
    )
    _run(*pip, f"{wheel}[tune]", cwd=tmp_path)
    assert "ready to run" in _run(command, "doctor", cwd=tmp_path)
    short = ("--set", "train.epochs=2")
    _run(command, "train", "digits", "--local", *short, cwd=tmp_path)
    _run(command, "init", "mine", cwd=tmp_path)
    _run(command, "train", "config.yaml", *short, cwd=tmp_path / "mine")
    space = tmp_path / "mine" / "space.yaml"
    space.write_text(space.read_text().replace("num_trials: 6", "num_trials: 2"))
    _run(command, "tune", "space.yaml", "--name", "search", cwd=tmp_path / "mine")
    assert (tmp_path / "mine" / "runs" / "search" / "best_config.yaml").is_file()
    assert "--resize-at" in _run(command, "completion", "bash", cwd=tmp_path)
