"""Shape of the product: no import circle, small folders and constructors, nothing that only tests reach.

Rooms that still exceed a limit stand in a table beside it. A row whose excess is gone fails until it is
deleted, so the tables only shrink.
"""

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

CIRCLES: tuple[set[str], ...] = ()
IMPORTS: dict[str, int] = {}
PARAMETERS: dict[str, int] = {}
UNREACHED = {
    "cluster": 40,
    "training": 108,
}
"""Lines by room."""


def remaining(found: Mapping[str, int], excess: Mapping[str, int]) -> dict[str, int]:
    """What exceeds the known excess, and as 0 the rows of it that are no longer needed."""
    worse = {name: size for name, size in found.items() if size > excess.get(name, 0)}
    return {**worse, **{name: 0 for name in excess if name not in found}}


def above(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if size > limit}


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    assert sorted(map(sorted, circles(imports(product())))) == sorted(map(sorted, CIRCLES))


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
    assert remaining(above(fan_out, MOST_IMPORTS), IMPORTS) == {}


def test_no_constructor_is_too_wide() -> None:
    assert remaining(above(constructor_widths(product()), MOST_PARAMETERS), PARAMETERS) == {}


def test_wide_constructor_is_found() -> None:
    parameters = ", ".join(f"p{i}=0" for i in range(7))
    code = f"class Wide:\n def __init__(self, {parameters}, *, {parameters.replace('p', 'q')}): ..."
    assert constructor_widths({"room": ast.parse(code)}) == {"room.Wide": 14}


def test_tables_of_excess_name_only_what_exceeds() -> None:
    assert remaining({"a": 18, "b": 20}, {"a": 18, "b": 19, "gone": 17}) == {"b": 20, "gone": 0}


def test_product_is_reached_from_its_entry_points() -> None:
    trees = product()
    entries = {"", "elastic", *(name for name in trees if name.split(".")[0] == "cli")}
    outside: set[str] = set()
    for pattern in ("jobs/*.py", "docs/examples/*.py"):
        for script in ROOT.glob(pattern):
            outside |= names_in(ast.parse(script.read_text(encoding="utf-8")))
    for pattern in ("jobs/**/*.yaml", "tune_spaces/*.yaml", "benchmarks/**/*.yaml"):
        for file in ROOT.glob(pattern):
            outside |= set(re.findall(r"[A-Za-z_]\w+", file.read_text(encoding="utf-8")))
    rooms: Counter[str] = Counter()
    rows = {}
    for one in unreached(trees, entries, outside):
        rooms[one.module.split(".")[0]] += one.lines
        rows[".".join(filter(None, (one.module, one.owner, one.name)))] = one.lines
    listed = {room: size for room, size in rooms.items() if room in UNREACHED}
    assert remaining(listed, UNREACHED) == {}, rows
    assert rooms.total() - sum(listed.values()) <= MOST_UNREACHED_LINES, rows


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


REFERENCE = re.compile(r"\bspec (?:[A-Z]-)?\d|\(spec\b(?! in| for)")
"""References to a document that no reader of the repository has."""
REFERENCES = {
    "tests",
    "training",
}
"""Rooms, and folders of the repository, that still have some."""


def test_no_file_refers_to_a_document_outside_the_repository() -> None:
    found = set()
    for path in tracked_files():
        is_text = path.suffix in {".py", ".md", ".yaml", ".toml"} and path != Path(__file__)
        if is_text and REFERENCE.search(path.read_text(encoding="utf-8")):
            below = PACKAGE if path.is_relative_to(PACKAGE) else ROOT
            found.add(path.relative_to(below).parts[0])
    assert found == REFERENCES


@pytest.mark.parametrize("text", ["(spec 1.1)", "as spec E-5 has it", "(spec, table 2)"])
def test_reference_to_an_unknown_document_is_found(text: str) -> None:
    assert REFERENCE.search(text)
