"""The product's modules as syntax trees, and what follows from them: imports, circles, reach."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "platform" / "elastic_kfac"
Function = (ast.FunctionDef, ast.AsyncFunctionDef)
Trees = Mapping[str, ast.Module]
"""Module name below the package (`kfac.refresh`; a package's own file is `kfac`) -> its tree."""


def tracked_files() -> list[Path]:
    """Every file of the repository that is under version control."""
    try:
        done = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        # An unpacked archive has no index; everything that is not a build output counts then.
        skipped = {".venv", "runs", "data", "build", "dist"}
        return [
            path
            for path in ROOT.rglob("*")
            if path.is_file()
            and path.relative_to(ROOT).parts[0] not in skipped
            and "__pycache__" not in path.parts
            and not any(part.endswith("_cache") for part in path.parts)
        ]
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def product() -> dict[str, ast.Module]:
    """Every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(trees: Trees) -> dict[str, set[str]]:
    """The product's modules that each module imports anywhere, for type checking too."""
    graph: dict[str, set[str]] = {name: set() for name in trees}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in targets:
                below = target.removeprefix("elastic_kfac.")
                if below != target:
                    graph[name].add(below if below in trees else below.rpartition(".")[0])
        graph[name] -= {name, ""}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """The sets of modules that reach each other by imports."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, queue = set(), [start]
        while queue:
            new = graph.get(queue.pop(), set()) - seen
            seen |= new
            queue += new
        reach[start] = seen
    found = {
        frozenset(other for other in reach[name] if name in reach.get(other, ()))
        for name in graph
        if name in reach[name]
    }
    return sorted((set(circle) for circle in found), key=sorted)


def constructor_widths(trees: Trees) -> dict[str, int]:
    """Parameters of every written `__init__`, by `module.Class`, without `self`."""
    widths = {}
    for name, tree in trees.items():
        for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            for method in owner.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    arguments = method.args
                    widths[f"{name}.{owner.name}"] = (
                        len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]) - 1
                    )
    return widths


@dataclass(frozen=True)
class Definition:
    """A function, a class or a method; `lines` of a class include its methods."""

    module: str
    name: str
    lines: int
    uses: frozenset[str]
    owner: str = ""
    """Class of a method."""
    implicit: bool = False
    """Whether a method may be called from outside the package once its class is in use."""


def unreached(trees: Trees, entries: Iterable[str], outside: Iterable[str]) -> list[Definition]:
    """Definitions that nothing leads to from the entry modules and the names used outside.

    Names are followed by their text, wherever they are defined, so a definition that shares its name
    with one in use counts as reached: this finds too little rather than too much.

    Args:
        trees: the product.
        entries: modules whose code runs without being called by other modules.
        outside: names that scripts, examples and configuration files use.
    """
    classes = {
        node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    live, open_modules, open_classes = set(outside), set(entries), set()
    for name in open_modules:
        live |= _used(trees[name].body)
    waiting = [
        one
        for name, tree in trees.items()
        if name not in open_modules
        for one in _definitions(name, tree, classes)
    ]
    while True:
        hits = {
            one
            for one in waiting
            if (
                (one.module, one.owner) in open_classes and (one.implicit or one.name in live)
                if one.owner
                else one.name in live
            )
        }
        if not hits:
            closed = {(one.module, one.name) for one in waiting if not one.owner}
            return [one for one in waiting if (one.module, one.owner) not in closed]
        waiting = [one for one in waiting if one not in hits]
        for one in hits:
            live |= one.uses
            if not one.owner:
                open_classes.add((one.module, one.name))
            if one.module not in open_modules:
                open_modules.add(one.module)
                live |= _used(_loose(trees[one.module]))


def names_in(tree: ast.AST) -> set[str]:
    """Every identifier in a piece of code, short strings included."""
    return _used([tree])


def _definitions(module: str, tree: ast.Module, classes: set[str]) -> Iterator[Definition]:
    for node in tree.body:
        if isinstance(node, Function):
            yield Definition(module, node.name, _lines(node), frozenset(_used([node])))
        elif isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, Function)]
            own = [part for part in node.body if not isinstance(part, Function)]
            uses = _used([*own, *node.bases, *node.keywords, *node.decorator_list])
            yield Definition(module, node.name, _lines(node), frozenset(uses))
            bases = {ast.unparse(base).split("[")[0].rpartition(".")[2] for base in node.bases}
            for method in methods:
                decorators = " ".join(map(ast.unparse, method.decorator_list))
                yield Definition(
                    module,
                    method.name,
                    _lines(method),
                    frozenset(_used([method])),
                    owner=node.name,
                    implicit=bool(bases - classes)
                    or method.name.startswith("__")
                    or "validator" in decorators,
                )


def _loose(tree: ast.Module) -> list[ast.stmt]:
    """A module's statements that run when it is imported, without its imports and `__all__`."""
    return [
        node
        for node in tree.body
        if not isinstance(node, (*Function, ast.ClassDef, ast.Import, ast.ImportFrom))
        and not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
    ]


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _used(nodes: Iterable[ast.AST]) -> set[str]:
    found: set[str] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop()
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                continue  # a docstring mentions names, it does not use them
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                found.add(name)
            case ast.alias(name=name):
                found.add(name.rpartition(".")[2])
            case ast.Constant(value=str(text)) if len(text) < 120:
                found |= set(re.findall(r"[A-Za-z_]\w+", text))
        queue += ast.iter_child_nodes(node)
    return found
