"""Values of result files, and the rows of documents that are made of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results"
_MARK = re.compile("\x02[^\x03]*\x03")


@cache
def load(name: str) -> Any:
    """A result file."""
    return json.loads((ROOT / RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def n(value: float | str, spec: str = "g") -> str:
    """A value of a file in a row or a text."""
    return f"\x02{value:{spec}}\x03"


def pick(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The first row with these values."""
    return next(r for r in rows if all(r.get(key) == value for key, value in wanted.items()))


def share(value: float, digits: int = 0) -> str:
    """A fraction in percent."""
    return f"{n(100 * value, f'.{digits}f')} %"


def of(text: str, count_only: bool = False) -> str:
    """`17 of 18` of a summary."""
    return n(text.split()[0] if count_only else text, "")


def file_of(name: str) -> str:
    return f"[{name}]({RESULTS}/{name}.json)"


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    document: str
    label: str
    """The first cell, with what a person has chosen: sizes, settings."""
    cells: tuple[str, ...]
    given: tuple[str, ...] = ()
    """Digits in the cells that are settings, not results."""

    @property
    def line(self) -> str:
        return plain(f"| {self.label} | {' | '.join(self.cells)} |")

    def unfounded(self) -> list[str]:
        """Digits in the cells that come from no file."""
        text = " | ".join(cell for cell in self.cells if not cell.startswith("["))
        for setting in self.given:
            text = text.replace(setting, "")
        return re.findall(r"(?<![\w-])\d[\d.,]*", _MARK.sub("", text))


@dataclass(frozen=True)
class Page:
    """What is checked in a document."""

    document: str
    rows: Callable[[], Iterable[Row]] = tuple
    """Rows of its tables."""
    texts: Callable[[], Iterable[str]] = tuple
    """Words with their numbers."""
    given: Mapping[str, str] = field(default_factory=dict)
    """Numbers with units that are no results of a benchmark: words around each, and why."""


def plain(text: str) -> str:
    """As the document has it."""
    return text.replace("\x02", "").replace("\x03", "").replace("|  |", "| |")
