"""Shape of the product: no import circle, small folders and constructors, no code only for tests."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from support.house import (
    PACKAGE,
    ROOT,
    circles,
    constructor_widths,
    imports,
    names_in,
    product,
    tracked_files,
    unreached,
)

MOST_MODULES_PER_FOLDER = 20
MOST_IMPORTS = 15
MOST_PARAMETERS = 12
MOST_UNREACHED_LINES = 100


def above(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if size > limit}


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    assert circles(imports(product())) == []


def test_circle_of_imports_for_type_checking_is_found() -> None:
    trees = {
        "a": ast.parse("from elastic_kfac.room import b"),
        "room.b": ast.parse("if TYPE_CHECKING:\n    import elastic_kfac.c"),
        "c": ast.parse("def late():\n    from elastic_kfac.a import thing"),
        "d": ast.parse("from elastic_kfac import a"),
    }
    assert circles(imports(trees)) == [{"a", "room.b", "c"}]


def test_no_folder_holds_too_many_modules() -> None:
    sizes = Counter(path.parent for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    assert {str(f): n for f, n in sizes.items() if n > MOST_MODULES_PER_FOLDER} == {}


def test_no_module_imports_too_many_others() -> None:
    fan_out = {name: len(targets) for name, targets in imports(product()).items()}
    assert above(fan_out, MOST_IMPORTS) == {}


def test_no_constructor_is_too_wide() -> None:
    assert above(constructor_widths(product()), MOST_PARAMETERS) == {}


def test_wide_constructor_is_found() -> None:
    parameters = ", ".join(f"p{i}=0" for i in range(7))
    code = f"class Wide:\n def __init__(self, {parameters}, *, {parameters.replace('p', 'q')}): ..."
    assert constructor_widths({"room": ast.parse(code)}) == {"room.Wide": 14}


def test_product_is_reached_from_its_entry_points() -> None:
    trees = product()
    entries = {
        "",
        "elastic",
        "checkpoints",
        *(name for name in trees if name.split(".")[0] == "cli"),
    }
    outside: set[str] = set()
    for pattern in ("jobs/*.py", "docs/examples/*.py"):
        for script in ROOT.glob(pattern):
            outside |= names_in(ast.parse(script.read_text(encoding="utf-8")))
    for pattern in ("jobs/**/*.yaml", "tune_spaces/*.yaml", "benchmarks/**/*.yaml"):
        for file in ROOT.glob(pattern):
            outside |= set(re.findall(r"[A-Za-z_]\w+", file.read_text(encoding="utf-8")))
    rows = {
        ".".join(filter(None, (one.module, one.owner, one.name))): one.lines
        for one in unreached(trees, entries, outside)
    }
    assert sum(rows.values()) <= MOST_UNREACHED_LINES, rows


@pytest.mark.parametrize("called", [False, True])
def test_planted_function_without_a_caller_is_unreached(called: bool) -> None:
    """A function counts as reached only by code that is itself reached; docstrings do not count."""
    trees = {
        "cli": ast.parse("from elastic_kfac.room import used\nused()"),
        "room": ast.parse(
            "__all__ = ['planted']\n"
            f"def used():\n    'See planted.'\n    return {'Thing().method()' if called else 'Thing()'}\n"
            "class Thing:\n    def __len__(self): return 0\n    def method(self): planted()\n"
            "def planted():\n    pass\n"
            "def dead():\n    planted()\n"
        ),
    }
    found = {one.name: one.lines for one in unreached(trees, ["cli"], [])}
    assert found == ({"dead": 2} if called else {"method": 1, "planted": 2, "dead": 2})


REFERENCE = re.compile(r"\bspec (?:[A-Z]-)?\d|\(spec,")
"""References to a document that no reader of the repository has."""


def test_no_file_refers_to_a_document_outside_the_repository() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in tracked_files()
        if path.suffix in {".py", ".md", ".yaml", ".toml"} and path != Path(__file__)
        if REFERENCE.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize("text", ["(spec 1.1)", "as spec E-5 has it", "(spec, table 2)"])
def test_reference_to_an_unknown_document_is_found(text: str) -> None:
    assert REFERENCE.search(text)
