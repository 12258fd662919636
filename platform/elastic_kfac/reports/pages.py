"""The page kit: templates to one HTML file each that needs no network; equal input gives equal bytes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from elastic_kfac import __version__
from elastic_kfac.data.storage import Storage, write_named_file
from elastic_kfac.errors import UsageError
from elastic_kfac.paths import join_uri

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    is_number: bool = False
    help: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table; the text is escaped unless it is markup."""

    text: object
    value: float | None = None
    """The key of columns of numbers when they are sorted; None comes last."""
    css: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table; `trial` connects it with the marks of that trial in the figures."""

    cells: Sequence[Cell]
    trial: int | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row names it."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    sortable: bool = False
    compact: bool = False
    """As narrow as its content, instead of as wide as the page."""

    @classmethod
    def of(
        cls, caption: str, head: str, rows: Sequence[Sequence[object]], *, compact: bool = False
    ) -> Table:
        """A table of plain values; `head` separates columns by `|`, and `#` begins one of numbers."""
        columns = [Column(title.lstrip("#"), title.startswith("#")) for title in head.split("|")]
        lines = [Row([c if isinstance(c, Cell) else Cell(c) for c in row]) for row in rows]
        return cls(caption, columns, lines, compact=compact)


def page(template: str, *, script: str = "", **content: Any) -> str:
    """A whole page.

    The content security policy forbids loading anything, and running anything but the page's own
    script: text of a run that got into the page by mistake could not become a program.

    Args:
        template: Name of a template that extends `base.html`.
        script: File of the page's script; empty for none.
        content: Variables of the template; `title` and `headline` among them.
    """
    program = _text(script) if script else ""
    digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    shared: dict[str, Any] = {
        "policy": Markup(policy),
        "style": Markup(_text("style.css")),
        "script": Markup(program),
        "tiles": {},
        "body": "",
    }
    return part(template, **{**shared, **content})


def part(template: str, **content: Any) -> Markup:
    """A rendered template, as markup for another one."""
    return Markup(_environment().get_template(template).render(content).strip() + "\n")


def yaml_text(value: Mapping[str, Any]) -> str:
    """A mapping as YAML for reading."""
    return yaml.safe_dump(dict(value), sort_keys=False, default_flow_style=None, width=96).rstrip()


def code(text: object) -> Markup:
    """Text in a typewriter font."""
    return Markup("<code>{}</code>").format(text)


def plain(value: object) -> str:
    """A value of a mapping as people write it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(plain(item) for item in value)
    return str(value)


def _labelled(svg: str, alternative: str) -> Markup:
    """A figure with the words that stand for it where it cannot be seen."""
    label = f'<svg role="img" aria-label="{escape(alternative)}" '
    return Markup(str(svg).replace("<svg ", label, 1))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": plain, "labelled": _labelled}
    environment.globals["version"] = __version__
    return environment


def _text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def write_page(folder: str | Path, out: str | Path | None, text: str) -> str | Path:
    """Writes `report.html` into a folder, or the file `out`; returns where it is.

    Raises:
        UsageError: If it cannot be written.
    """
    if out is not None:
        write_named_file(out, text.encode())
        return out
    try:
        Storage(folder).write("report.html", text.encode())
    except OSError as error:
        raise UsageError(
            "cannot write report.html", given=folder, change=f"{error}; name a file with --out"
        ) from None
    return join_uri(str(folder), "report.html")
