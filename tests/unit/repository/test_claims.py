"""Numbers in README and docs come from files of results, and every benchmark has a tiny form."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from support.house import ROOT


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"benchmark_{name}", ROOT / f"benchmarks/{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def claims() -> Iterator[ModuleType]:
    module = script("claims")
    yield module
    del sys.modules[module.__name__]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_number_is_that_of_its_file(claims: ModuleType) -> None:
    assert claims.problems(read) == []
    assert len(claims.rows()) > 30


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("by a restart | ", "by a restart | 9", "stale or missing: | Planned node removal"),
        ("## What works", "It takes 12 ms.\n\n## What works", "a number without a file: 12 ms"),
        ("(50 s at 25 M", "(40 s at 25 M", "stale or missing: 'redone (50 s"),
        ("about 6 GB", "a few GB", "given, but not there: 'about 6 GB'"),
    ],
)
def test_changed_document_is_found(claims: ModuleType, old: str, new: str, says: str) -> None:
    text = read("README.md")
    assert old in text
    changed = text.replace(old, new)
    found = claims.problems(lambda name: changed if name == "README.md" else read(name))
    assert any(says in line for line in found), found


def test_digit_that_is_typed_into_a_row_is_found(claims: ModuleType) -> None:
    time = claims.readme.n(4.2, ".1f")
    row = claims.Row("README.md", "time of 3", (f"{time} s, 17 steps", "lr 0.1"))
    assert row.unfounded() == ["17", "0.1"]
    assert dataclasses.replace(row, given=("17", "lr 0.1")).unfounded() == []


def test_missing_value_fails_in_one_line(
    claims: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = claims.readme
    found = page.load
    monkeypatch.setattr(page, "load", lambda name: {} if name == "chaos" else found(name))
    monkeypatch.setattr(sys, "argv", ["claims.py"])
    assert claims.main() == 1
    assert "lacks what a document states" in capsys.readouterr().out


def test_every_benchmark_has_a_tiny_form() -> None:
    smoke = script("smoke")
    folder = ROOT / "benchmarks"
    runnable = {
        str(path.relative_to(folder))
        for path in folder.rglob("*.py")
        if re.search(r"^if __name__ ==", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert runnable == {each.script for each in smoke.SMOKES} | set(smoke.LEFT_OUT)
