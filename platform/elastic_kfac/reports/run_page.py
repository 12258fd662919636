"""One run as one HTML file that needs no network: styles and figures are inside it."""

from __future__ import annotations

import base64
import hashlib
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from elastic_kfac import __version__
from elastic_kfac.observability.metric_names import METRICS
from elastic_kfac.reports.figures import curvature_figure, learning_figure, throughput_figure
from elastic_kfac.runs.history import Row, Run, number, read_run
from elastic_kfac.runs.summary import duration, headline

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: #1f2933;
       font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 48px; }
header p { margin: 0; color: #52606d; font-size: 13px; }
h1 { font-size: 25px; line-height: 1.3; margin: 4px 0 18px; font-weight: 650; max-width: 62ch; }
h2 { font-size: 16px; margin: 0 0 12px; }
section { background: #fff; border: 1px solid #e4e7eb; border-radius: 8px; padding: 18px 20px;
          margin-top: 16px; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(125px, 1fr)); gap: 10px; }
.tile { background: #fff; border: 1px solid #e4e7eb; border-radius: 8px; padding: 11px 13px; }
.tile b { display: block; font-size: 19px; font-weight: 620; white-space: nowrap; }
.tile span { color: #616e7c; font-size: 12px; white-space: nowrap; }
.pair { display: grid; gap: 16px;
        grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
svg { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { text-align: left; color: #616e7c; font-weight: 500; white-space: nowrap; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid #e4e7eb; vertical-align: top; }
tr:last-child td, tbody tr:last-child th { border-bottom: 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.kind { background: #e4ecf4; border-radius: 4px; padding: 1px 7px; white-space: nowrap; }
.kind.bad { background: #f8ddd4; }
.note { color: #616e7c; font-size: 13px; margin: 10px 0 0; }
td .note { font-size: 12px; margin: 2px 0 0; }
pre { margin: 0; font: 12px/1.55 ui-monospace, "DejaVu Sans Mono", monospace; overflow-x: auto; }
code { font: 12px ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
details summary { cursor: pointer; font-weight: 600; font-size: 16px; }
details[open] summary { margin-bottom: 10px; }
@media (max-width: 760px) {
  main { padding: 18px 12px 32px; }
  h1 { font-size: 20px; }
  section { padding: 14px 12px; }
  /* A wide figure keeps its size and its box scrolls, so that its text stays legible. */
  main > section > svg { min-width: 680px; }
}
@media print {
  body { background: #fff; }
  section { break-inside: avoid; overflow: visible; }
}
"""
UNPLANNED = ("fail", "kill", "lost", "crash", "error")


def write_report(run_folder: Path) -> Path:
    """Writes `report.html` into a run's folder, for a finished run as well as for a living one.

    Returns:
        The path of the page.

    Raises:
        UsageError: If the folder is not there or holds no run.
    """
    folder = Path(run_folder)
    return write_page(folder / "report.html", render_report(read_run(folder)))


def render_report(run: Run) -> str:
    """The page of a run; equal runs give equal text."""
    parts = [
        "<header>",
        f"<p>elastic-kfac run <b>{escaped(run.name)}</b> · {escaped(_what(run))}</p>",
        f"<h1>{escaped(headline(run))}</h1>",
        "</header>",
        _tiles(run),
    ]
    if run.steps:
        parts.append(section("Learning", learning_figure(run) + _figure_note(run)))
        panels = [section("", throughput_figure(run))]
        if _kfac(run):
            panels.append(section("", curvature_figure(run)))
        parts.append(f'<div class="pair">{"".join(panels)}</div>')
    else:
        parts.append(section("Learning", "<p>No step has been logged yet.</p>"))
    # Here, because its figures are made of this page's parts.
    from elastic_kfac.reports.analysis import analysis_sections

    parts += analysis_sections(run)
    parts.append(section("Events", _events(run)))
    if plan := _newest_plan(run):
        parts.append(section("Plan in use at the end", f"<pre>{escaped(plan)}</pre>"))
    parts.append(fold("Configuration", f"<pre>{escaped(_yaml(run.config))}</pre>"))
    parts.append(fold("Result", mapping_table(run.result or {"status": "no result yet"})))
    parts.append(section("Provenance", _provenance(run)))
    return page(run.name, parts)


def page(title: str, parts: Sequence[str], *, style: str = "", script: str = "") -> str:
    """A whole page that needs no network, and may not use it.

    The content security policy lets nothing load, and nothing run but `script`: text of a run that
    got into the page by mistake could not become a program.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escaped(title)} · elastic-kfac</title>\n<style>{STYLE}{style}</style></head>\n"
        f"<body><main>\n{body}\n</main>{f'<script>{script}</script>' if script else ''}"
        "</body></html>\n"
    )


def write_page(target: Path, text: str) -> Path:
    """Replaces a page as a whole: a browser that reloads never sees half of one."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)
    return target


def _what(run: Run) -> str:
    model = _section_of(run, "model").get("name", "?")
    shards = _section_of(run, "data").get("shards", "?")
    optimizer = _section_of(run, "optimizer").get("name", "?")
    rule = f"K-FAC + {optimizer}" if _kfac(run) else optimizer
    return f"{model} on {shards}, {rule}"


def _tiles(run: Run) -> str:
    best, target, reached = run.best_accuracy, run.target_accuracy, run.time_to_accuracy_s
    loss = next((v for row in reversed(run.steps) if (v := number(row, "loss")) is not None), None)
    sizes = " → ".join(map(str, run.world_sizes[-6:]))
    if len(run.world_sizes) > 6:
        sizes = "… → " + sizes
    tiles = [
        ("best accuracy", "–" if best is None else f"{best:.2%}"),
        (
            "time to accuracy" if target is None else f"time to {target:.1%}",
            "–" if reached is None else duration(reached),
        ),
        ("committed steps", f"{run.last_step:,}"),
        ("workers", sizes or "–"),
        ("without steps", duration(run.downtime_s)),
        ("steps redone", f"{run.steps_redone:,}"),
        ("training loss", "–" if loss is None else f"{loss:.3g}"),
        ("wall time", duration(run.wall_time_s)),
    ]
    cells = (
        f'<div class="tile"><span>{escaped(n)}</span><b>{escaped(v)}</b></div>' for n, v in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _figure_note(run: Run) -> str:
    note = "Thin line: every logged step; thick line: running median."
    if len(run.segments) > 1:
        note += " Dashed lines: the world size changed; grey: time without steps."
    return f'<p class="note">{note}</p>'


def _events(run: Run) -> str:
    events = [event for event in run.events if "provenance" not in event]
    if not events:
        return "<p>None: the group of workers never changed.</p>"
    head = (
        '<th class="n">after</th><th>kind</th><th class="n">step</th><th>workers</th>'
        '<th>reason</th><th class="n">without steps</th><th class="n">steps redone</th>'
    )
    if plans := any(event.get("plan") for event in events):
        head += "<th>plan</th>"
    origin = next((at for event in events if (at := number(event, "time")) is not None), 0.0)
    rows = "".join(_event_row(event, origin, plans) for event in events)
    torn = f'<p class="note">{run.torn_lines} torn line(s) left out.</p>' if run.torn_lines else ""
    return f"<table><tr>{head}</tr>{rows}</table>{torn}"


def _event_row(event: Row, origin: float, plans: bool) -> str:
    kind = str(event.get("kind", "event"))
    bad = " bad" if any(word in kind.lower() for word in UNPLANNED) else ""
    before = event.get("from_world_size") or None
    after = event.get("to_world_size", event.get("world_size"))
    workers = "" if after is None else f"{before} → {after}" if before is not None else f"{after}"
    at, redone = number(event, "time"), number(event, "steps_redone")
    downtime = number(event, "downtime_s") if before is not None else None
    cells = [
        ("n", "" if at is None else duration(at - origin)),
        ("n", escaped(event.get("step", ""))),
        ("", escaped(workers)),
        ("", escaped(event.get("reason") or "") + _phases(event)),
        ("n", "" if downtime is None else duration(downtime)),
        ("n", "" if redone is None else f"{redone:,.0f}"),
    ]
    if plans:
        cells.append(("", f"<code>{escaped(_plan_name(event.get('plan')))}</code>"))
    row = [
        f'<td class="{name}">{text}</td>' if name else f"<td>{text}</td>" for name, text in cells
    ]
    row.insert(1, f'<td><span class="kind{bad}">{escaped(kind)}</span></td>')
    return f"<tr>{''.join(row)}</tr>"


def _phases(event: Row) -> str:
    phases = event.get("phases_s")
    if not isinstance(phases, Mapping):
        return ""
    parts = [f"{name} {max(0.0, number(phases, name) or 0.0):.1f} s" for name in phases]
    return f'<div class="note">{escaped(" · ".join(parts))}</div>'


def _plan_name(plan: object) -> str:
    if isinstance(plan, Mapping):
        name = str(plan.get("sha256", ""))[:12]
        fraction = plan.get("grad_worker_frac")
        return name if fraction is None else f"{name} grad_worker_frac={fraction:g}".strip()
    text = "" if plan is None else str(plan)
    if "\n" in text:
        return "below"
    return text[:12] if len(text) == 64 else text


def _newest_plan(run: Run) -> str:
    for event in reversed(run.events):
        plan = event.get("plan")
        if isinstance(plan, str) and "\n" in plan:
            return plan
        if isinstance(plan, Mapping):
            table = plan.get("table")
            return str(table) if table else _yaml(plan)
    return ""


def _provenance(run: Run) -> str:
    recorded = mapping_table(run.provenance) if run.provenance else ""
    note = f"Page written by elastic-kfac {__version__} from {escaped(run.location)}."
    if not recorded:
        note += " The run recorded neither versions nor hardware."
    columns = {key for row in run.steps[:50] for key in row}
    meanings = [m for m in METRICS if m.column in columns]
    legend = "".join(
        f"<tr><td><code>{m.column}</code></td><td>{escaped(m.unit)}</td><td>{escaped(m.help)}</td></tr>"
        for m in meanings
    )
    table = (
        "<details><summary>Columns of metrics.jsonl</summary>"
        f"<table><tr><th>column</th><th>unit</th><th>meaning</th></tr>{legend}</table></details>"
        if legend
        else ""
    )
    return f'{recorded}<p class="note">{note}</p>{table}'


def mapping_table(mapping: Mapping[str, Any]) -> str:
    """Names and values in two columns."""
    rows = "".join(
        f"<tr><th>{escaped(key)}</th><td><code>{escaped(_plain(value))}</code></td></tr>"
        for key, value in mapping.items()
        if key != "provenance"
    )
    return f"<table>{rows}</table>"


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def _kfac(run: Run) -> bool:
    return bool(_section_of(run, "kfac").get("enabled", False))


def _section_of(run: Run, name: str) -> Mapping[str, Any]:
    section = run.config.get(name)
    return section if isinstance(section, Mapping) else {}


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, default_flow_style=None, width=96).rstrip()


def section(title: str, content: str) -> str:
    """A box of a page, with or without a heading."""
    heading = f"<h2>{escaped(title)}</h2>" if title else ""
    return f"<section>{heading}{content}</section>"


def fold(title: str, content: str) -> str:
    """A box that opens when its title is clicked."""
    return f"<section><details><summary>{escaped(title)}</summary>{content}</details></section>"


def escaped(value: object) -> str:
    """A value as text of a page."""
    return html.escape(str(value))
