"""The page of a run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from elastic_kfac.observability.metric_names import METRICS
from elastic_kfac.observability.quality import quality_of, shown_quality
from elastic_kfac.reports.analysis import analysis_section
from elastic_kfac.reports.pages import Cell, Table, code, page, write_page, yaml_text
from elastic_kfac.reports.run_card import (
    batch_figure,
    cost_tables,
    plan_changes,
    robustness_figure,
)
from elastic_kfac.reports.run_figures import curvature_figure, learning_figure, throughput_figure
from elastic_kfac.runs.history import Run, is_change, number, read_run
from elastic_kfac.runs.summary import duration, headline, moved_text
from elastic_kfac.state.run_folder import Row

UNPLANNED = ("fail", "kill", "lost", "crash", "error", "slow")


def write_report(uri: str | Path, out: str | Path | None = None) -> Run:
    """Writes `report.html` into the folder of a run, finished or not, or the file `out`.

    Raises:
        UsageError: If the folder is not there, holds no run or cannot be written.
    """
    run = read_run(uri)
    write_page(uri, out, render_report(run))
    return run


def render_report(run: Run) -> str:
    """The page of a run; equal runs give equal text."""
    kfac = bool(_section_of(run, "kfac").get("enabled", False))
    optimizer = _section_of(run, "optimizer").get("name", "?")
    model = _section_of(run, "model").get("name", "?")
    shards = _section_of(run, "data").get("shards", "?")
    note = "Thin line: every logged step; thick line: running median."
    if len(run.segments) > 1:
        note += " Dashed lines: changes of the world size; grey: time without steps."
    if run.pauses:
        note += " Dotted lines: the run was continued; no time counts what lay between."
    columns = {key for row in run.steps[:50] for key in row}
    result = {k: v for k, v in (run.result or {}).items() if k != "provenance"}
    return page(
        "run.html",
        title=run.name,
        headline=headline(run),
        what=f"{model} on {shards}, {f'K-FAC + {optimizer}' if kfac else optimizer}",
        tiles=_tiles(run),
        learning=learning_figure(run) if run.steps else "",
        throughput=throughput_figure(run) if run.steps else "",
        curvature=curvature_figure(run) if run.steps and kfac else "",
        figure_note=note,
        batch=batch_figure(run),
        robustness=robustness_figure(run),
        costs=cost_tables(run),
        plans=plan_changes(run),
        analysis=analysis_section(run),
        events=_events(_shown_events(run.events)),
        torn=f"{run.torn_lines} torn line(s) left out." if run.torn_lines else "",
        configuration=yaml_text(run.config),
        result=result or {"status": "no result yet"},
        provenance=run.provenance,
        location=run.location,
        metrics=[metric for metric in METRICS if metric.column in columns],
    )


def _tiles(run: Run) -> dict[str, str]:
    best, target, reached = run.best_value, run.target_value, run.time_to_target_s
    loss = next((v for row in reversed(run.steps) if (v := number(row, "loss")) is not None), None)
    sizes = " → ".join(map(str, run.world_sizes[-6:]))
    if len(run.world_sizes) > 6:
        sizes = "… → " + sizes
    label = quality_of(run.metric).label
    to_target = f"time to {label}" if target is None else f"time to {_goal(run.metric, target)}"
    return {
        f"best {label}": "–" if best is None else shown_quality(run.metric, best),
        to_target: "–" if reached is None else duration(reached),
        "committed steps": f"{run.last_step:,}",
        "workers": sizes or "–",
        "downtime": duration(run.downtime_s),
        "steps redone": f"{run.steps_redone:,}",
        "training loss": "–" if loss is None else f"{loss:.3g}",
        "wall time": duration(run.wall_time_s),
    }


def _goal(metric: str, target: float) -> str:
    return f"{target:.1%}" if quality_of(metric).is_share else f"{target:.4g}"


def _shown_events(events: Sequence[Row]) -> list[Row]:
    """The events of the table, without those that another one or another part of the page shows."""
    changes = (i for i, e in enumerate(events) if is_change(e) or e.get("kind") == "continue")
    last_change = max(changes, default=-1)
    # A change gives the steps redone by itself; whoever has no rows of changes has only `restored`.
    return [
        event
        for index, event in enumerate(events)
        if "provenance" not in event
        and event.get("kind") != "costs"
        and not (event.get("kind") == "restored" and index < last_change)
    ]


def _events(events: Sequence[Row]) -> Table:
    head = "kind|#time|#step|workers|reason|#downtime|#steps redone"
    has_plans = any(event.get("plan") for event in events)
    origin = next((at for event in events if (at := number(event, "time")) is not None), 0.0)
    # A clock that was set back does not make an event earlier than the one before.
    times = itertools.accumulate((number(event, "time") or 0.0 for event in events), max)
    rows = [_event_row(event, at - origin) for event, at in zip(events, times, strict=True)]
    if has_plans:
        head += "|plan"
        rows = [[*r, code(e.get("plan") or "")] for r, e in zip(rows, events, strict=True)]
    return Table.of("Events", head, rows)


def _event_row(event: Row, since_s: float) -> list[object]:
    kind = str(event.get("kind", "event"))
    bad = " bad" if any(word in kind.lower() for word in UNPLANNED) else ""
    before = event.get("from_world_size") or None
    after = event.get("to_world_size", event.get("world_size"))
    workers = "" if after is None else f"{before} → {after}" if before is not None else f"{after}"
    redone = number(event, "steps_redone")
    downtime = number(event, "downtime_s") if before is not None else None
    return [
        Markup('<span class="kind{}">{}</span>').format(bad, kind),
        "" if number(event, "time") is None else duration(since_s),
        event.get("step", ""),
        workers,
        Markup("{}{}").format(event.get("reason") or "", _notes(event)),
        "" if downtime is None else duration(downtime),
        Cell("" if redone is None else f"{redone:,.0f}", redone),
    ]


def _notes(event: Row) -> Markup:
    """When the phases of a change were reached, and how much state moved."""
    phases = event.get("phases_s")
    if not isinstance(phases, Mapping):
        phases = {}
    parts = [f"{name} {max(0.0, number(phases, name) or 0.0):.1f} s" for name in phases]
    if moved := moved_text(event):
        parts.append(moved)
    if not parts:
        return Markup("")
    return Markup('<div class="note">{}</div>').format(" · ".join(parts))


def _section_of(run: Run, name: str) -> Mapping[str, Any]:
    section = run.config.get(name)
    return section if isinstance(section, Mapping) else {}
