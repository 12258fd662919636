"""What the page of a search has beside the figures: its style, its script, tables and links."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from elastic_kfac.reports.run_page import escaped

STYLE = """
nav { font-size: 13px; margin: 12px 0 0; display: flex; flex-wrap: wrap; gap: 4px 14px; }
a { color: #0b5c8f; }
h3 { font-size: 14px; margin: 20px 0 8px; }
h1 { overflow-wrap: anywhere; }
.state { display: inline-block; border-radius: 4px; padding: 1px 8px; font-weight: 600;
         background: #d9ead3; color: #234d1f; }
.state.running { background: #cfe3f5; color: #0b3d66; }
.state.failed, .state.interrupted { background: #f8ddd4; color: #7a2a10; }
.bar { height: 6px; border-radius: 3px; background: #d5dbe2; margin: 10px 0 0; overflow: hidden; }
.bar i { display: block; height: 100%; background: #0b69a3; }
.live { margin: 8px 0 0; font-size: 13px; color: #52606d; }
.live label { margin-left: 10px; }
figure { margin: 0; min-width: 0; }
figure.wide { overflow-x: auto; }
figure.narrow { max-width: 600px; }
figcaption { color: #52606d; font-size: 13px; margin-top: 6px; }
.two { display: grid; gap: 22px;
       grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); }
.scroll { overflow: auto; max-height: 640px; }
.scroll thead th { position: sticky; top: 0; background: #fff; z-index: 1;
                   white-space: normal; vertical-align: bottom; }
th button { all: unset; cursor: pointer; }
th button:focus-visible, a:focus-visible, summary:focus-visible, .scroll:focus-visible
  { outline: 2px solid #0b69a3; outline-offset: 2px; }
th button::after { content: " ↕"; color: #9aa5b1; }
th[aria-sort=ascending] button::after { content: " ↑"; color: inherit; }
th[aria-sort=descending] button::after { content: " ↓"; color: inherit; }
tbody tr.chosen { background: #fdf3ea; }
tbody tr.lit, tbody tr[data-t]:hover { background: #eaf3fa; }
tbody th { color: inherit; font-weight: 600; position: sticky; left: 0; background: #fff; }
tbody tr.chosen th { background: #fdf3ea; }
tbody tr.lit th, tbody tr[data-t]:hover th { background: #eaf3fa; }
.state-cell { white-space: nowrap; }
.marking svg [data-t]:not(.lit) { opacity: .12; }
.download { display: inline-block; border: 1px solid #9fb3c8; border-radius: 6px; font-size: 13px;
            padding: 3px 10px; margin: 0 8px 10px 0; text-decoration: none; background: #fff;
            font-family: inherit; color: #0b5c8f; cursor: pointer; }
.kind.good { background: #d9ead3; }
.why { max-width: 70ch; overflow-wrap: anywhere; white-space: normal; }
td code { white-space: nowrap; }
td.why { min-width: 180px; }
td.why code { white-space: normal; overflow-wrap: normal; }
@media (max-width: 760px) { figure.wide svg { min-width: 680px; } }
@media print {
  .scroll { max-height: none; overflow: visible; }
  nav, .live, .download, th button::after { display: none; }
  table { font-size: 10px; }
}
"""

SCRIPT = """
(() => {
  const one = (event, what) => event.target instanceof Element && event.target.closest(what);
  const value = (row, column) => {
    const cell = row.cells[column], given = cell.dataset.v;
    return given === undefined ? cell.textContent.trim() : given === '' ? null : Number(given);
  };
  const compare = (a, b) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return typeof a === 'number' ? a - b : a.localeCompare(b, undefined, {numeric: true});
  };
  document.addEventListener('click', event => {
    const button = one(event, 'th button');
    if (button) {
      const head = button.closest('th'), body = head.closest('table').tBodies[0];
      const down = head.getAttribute('aria-sort') === 'ascending';
      for (const other of head.parentNode.cells) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const rows = [...body.rows].sort((a, b) => {
        const left = value(a, head.cellIndex), right = value(b, head.cellIndex);
        const order = compare(left, right);
        return down && left !== null && right !== null ? -order : order;
      });
      body.append(...rows);
    }
    const copy = one(event, '[data-copy]');
    if (copy) {
      const text = document.getElementById(copy.dataset.copy).textContent;
      const said = done => { copy.textContent = done; };
      if (!navigator.clipboard) return said('select and copy by hand');
      navigator.clipboard.writeText(text).then(() => said('copied'), () => said('not allowed'));
    }
  });
  let marked = null;
  const mark = index => {
    if (index === marked) return;
    marked = index;
    document.body.classList.toggle('marking', index !== null);
    for (const part of document.querySelectorAll('[data-t]'))
      part.classList.toggle('lit', index !== null && part.dataset.t === index);
  };
  document.addEventListener('pointerover', event => {
    const part = one(event, '[data-t]');
    mark(part ? part.dataset.t : null);
  });
  const live = document.getElementById('live');
  if (live) {
    const written = document.getElementById('written');
    written.textContent = 'This page was written ' + document.lastModified + '.';
    live.checked = location.hash === '#live';
    let timer = 0;
    const follow = () => {
      clearInterval(timer);
      if (live.checked) timer = setInterval(() => location.reload(), 10000);
    };
    live.addEventListener('change', () => {
      history.replaceState(null, '', live.checked ? '#live' : location.pathname);
      follow();
    });
    follow();
  }
})();
"""


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    is_number: bool = False
    help: str = ""


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and what it is sorted by."""

    content: str
    """Markup; text has to be escaped."""
    value: float | None = None
    """For columns of numbers; None sorts last."""
    css: str = ""


@dataclass(frozen=True)
class Line:
    """A row of a table; `trial` connects it with the figures."""

    cells: Sequence[Cell]
    trial: int | None = None
    chosen: bool = False


def table(
    caption: str, columns: Sequence[Column], lines: Sequence[Line], *, sortable: bool = False
) -> str:
    """A table whose head names its columns, for the eye and for screen readers.

    The first cell of each row is its name.
    """
    head = []
    for column in columns:
        label = escaped(column.title)
        title = f' title="{html.escape(column.help)}"' if column.help else ""
        css = ' class="n"' if column.is_number else ""
        inner = f'<button type="button">{label}</button>' if sortable else label
        head.append(f'<th scope="col"{css}{title}>{inner}</th>')
    body = []
    for line in lines:
        cells = []
        for at, (cell, column) in enumerate(zip(line.cells, columns, strict=True)):
            css = " ".join(name for name in ("n" if column.is_number else "", cell.css) if name)
            attributes = f' class="{css}"' if css else ""
            if column.is_number:
                attributes += f' data-v="{"" if cell.value is None else repr(cell.value)}"'
            tag, scope = ("th", ' scope="row"') if at == 0 else ("td", "")
            cells.append(f"<{tag}{scope}{attributes}>{cell.content}</{tag}>")
        trial = "" if line.trial is None else f' data-t="{line.trial}"'
        chosen = ' class="chosen"' if line.chosen else ""
        body.append(f"<tr{trial}{chosen}>{''.join(cells)}</tr>")
    label = html.escape(caption)
    content = (
        f'<table aria-label="{label}"><thead><tr>{"".join(head)}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{content}</div>'


def figure(
    svg: str,
    alternative: str,
    caption: str = "",
    *,
    shape: Literal["", "wide", "narrow"] = "",
) -> str:
    """A figure with the words that stand for it where it cannot be seen."""
    if not svg:
        return ""
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alternative)}" ', 1)
    css = f' class="{shape}"' if shape else ""
    css += ' tabindex="0"' if shape == "wide" else ""
    said = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure{css}>{svg}{said}</figure>"


def download(name: str, content: str, kind: str) -> str:
    """A link that saves a file which is inside the page."""
    data = quote(content, safe="")
    return (
        f'<a class="download" download="{html.escape(name)}" '
        f'href="data:{kind};charset=utf-8,{data}">Save {escaped(name)}</a>'
    )


def named_section(identity: str, title: str, content: str) -> str:
    """A box of the page that can be linked to."""
    return (
        f'<section id="{identity}" aria-labelledby="{identity}-title">'
        f'<h2 id="{identity}-title">{escaped(title)}</h2>{content}</section>'
    )


def badge(status: str) -> str:
    """A state as a small label."""
    css = {"finished": " good", "failed": " bad", "refused": " bad"}.get(status, "")
    return f'<span class="kind{css}">{escaped(status)}</span>'


def pairs(values: Mapping[str, Any], write: Any) -> str:
    """`key=value, …` as code."""
    text = ", ".join(f"{key}={write(value)}" for key, value in values.items())
    return f"<code>{escaped(text)}</code>"
