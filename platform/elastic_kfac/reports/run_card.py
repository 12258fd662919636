"""The part of a run's page about its costs: where time, bytes and memory go, and what plans did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from elastic_kfac.reports.figures import ACCENT, EVALUATION, GREEN, drawn, plot_points
from elastic_kfac.reports.pages import Cell, Table
from elastic_kfac.runs.history import Row, Run, number
from elastic_kfac.runs.summary import moved_text

_PHASES = {
    "data": "waiting for data",
    "passes": "forward and backward",
    "gradients": "sum of gradients",
    "factors": "statistics",
    "decompositions": "decompositions",
    "preconditioning": "preconditioning",
    "optimizer": "optimizer",
}
_MEMORY = {
    "factors": "factors",
    "second_order": "decompositions",
    "last_step": "trust region",
    "momentum": "momentum",
    "snapshots": "snapshots",
    "pending": "sums of the passes",
}
_HALF = (5.5, 2.6)


def cost_tables(run: Run) -> list[Table]:
    """One table per number of workers: the mean step measured and by the model."""
    latest: dict[int, Row] = {}
    for event in run.events:
        size = number(event, "world_size")
        if event.get("kind") == "costs" and size is not None and number(event, "step_s"):
            latest[int(size)] = event
    return [_cost_table(size, event) for size, event in sorted(latest.items())]


def _cost_table(size: int, event: Row) -> Table:
    seconds, model = _numbers(event, "seconds"), event.get("model")
    expected = model if isinstance(model, Mapping) else {}
    step = number(event, "step_s") or 0.0
    workers = "1 worker" if size == 1 else f"{size} workers"
    rows: list[list[object]] = []
    predicted = _numbers(expected, "seconds")
    named = {name: seconds[name] for name in _PHASES if name in seconds}
    rest = {"other": max(0.0, step - sum(named.values()))}
    for name, value in {**named, **rest}.items():
        rows.append(_cost_row(_PHASES.get(name, name), value, predicted.get(name), 1e-3, "ms"))
        rows[-1].append(Cell(f"{value / step:.0%}", value / step))
    rows.append([*_cost_row("whole step", step, None, 1e-3, "ms"), Cell("100%", 1.0)])
    received, by_model = _numbers(event, "bytes"), _numbers(expected, "bytes")
    if elsewhere := number(event, "decomposed_elsewhere"):
        rows.append(["decompositions in other processes", f"{elsewhere:,.0f} in all", "", "", ""])
    whole = sum(received.values())
    for name, value in received.items() if whole else ():
        row = _cost_row(f"received: {name}", value, by_model.get(name), 2.0**20, "MiB")
        rows.append([*row, Cell(f"{value / whole:.0%}", value / whole)])
    memory, held = _numbers(event, "memory"), _numbers(expected, "memory")
    both = memory.get("factors", 0.0) + memory.get("second_order", 0.0)
    if both:
        expected_bytes = held.get("factors and decompositions")
        row = _cost_row("held: factors and decompositions", both, expected_bytes, 2.0**20, "MiB")
        rows.append([*row, ""])
    for name, value in memory.items():
        if name in ("total", "factors", "second_order") or not value:
            continue
        title = _MEMORY.get(name, name)
        text = title if "peak" in name else f"held: {title}"
        rows.append([*_cost_row(text, value, None, 2.0**20, "MiB"), ""])
    head = f"a step on {workers}|#measured|#by the model|#measured / model|#share"
    return Table.of(f"Costs of a step on {workers}", head, rows, compact=True)


def _cost_row(
    title: str, value: float, model: float | None, unit: float, name: str
) -> list[object]:
    ratio = value / model if model else None
    return [
        title,
        Cell(f"{value / unit:.3g} {name}", value / unit),
        Cell("–" if model is None else f"{model / unit:.3g} {name}", model),
        Cell("–" if ratio is None else f"{ratio:.2f}", ratio),
    ]


def _numbers(row: Mapping[str, Any], name: str) -> dict[str, float]:
    part = row.get(name)
    part = part if isinstance(part, Mapping) else {}
    return {str(key): value for key in part if (value := number(part, key)) is not None}


def plan_changes(run: Run) -> Table:
    """What was planned anew and why, in words; no rows where nothing was."""
    rows: list[list[object]] = []
    before = ""
    for event in run.events:
        kind = str(event.get("kind"))
        step = number(event, "step")
        if kind == "retuned":
            what = f"statistics every {event.get('factor_update_steps')} and decompositions every "
            what += f"{event.get('inverse_update_steps')} steps, damping {event.get('damping'):.3g}"
            gain = number(event, "predicted_gain")
            why = str(event.get("reason", ""))
            if gain is not None:
                why += f"; predicted gain {gain:.0%}"
        elif kind == "replanned":
            changes = [str(line) for line in event.get("changes") or ()]
            if changes == ["no change"]:  # what earlier versions reported
                continue
            what = _changes_in_words(changes)
            why = str(event.get("reason", ""))
        elif event.get("plan"):
            plan = str(event["plan"]).rpartition(",")[0]  # without the hash
            if plan == before:
                continue
            before, what = plan, plan
            why = str(event.get("plan_reason") or event.get("reason") or "")
        else:
            continue
        if moved := moved_text(event):
            why = f"{why}; {moved}" if why else moved
        size = event.get("world_size", event.get("to_world_size", ""))
        rows.append(["" if step is None else f"step {step:,.0f}", size, what, why])
    return Table.of("Plans", "when|#workers|plan|why", rows)


def _changes_in_words(changes: Sequence[str]) -> str:
    general = [line for line in changes if line.startswith(("world_size", "columns"))]
    layers = len(changes) - len(general)
    moved = f"{layers} layer{'s' if layers > 1 else ''} at other ranks" if layers else ""
    return "; ".join(filter(None, [*general, moved]))


def batch_figure(run: Run) -> Markup:
    """Global batch size, and workers wanted and present, over epochs; empty where neither changed."""

    def draw(figure: Figure) -> bool:
        names = ("global_batch_size", "wanted_workers", "world_size")
        points = {name: _by_epoch(run, name) for name in names}
        points["global_batch_size"] = _without_remainders(points["global_batch_size"])
        sizes = {y for _, y in points["global_batch_size"]}
        grows = run.config.get("batch", {}).get("policy", "constant") != "constant"
        if not points["wanted_workers"] and not (grows and len(sizes) > 1):
            return False
        batch = figure.subplots()
        plot_points(
            batch, points["global_batch_size"], color=EVALUATION, lw=1.5, drawstyle="steps-post"
        )
        batch.set_ylim(bottom=0)
        batch.set_xlabel("epoch")
        batch.set_ylabel("samples per step", color=EVALUATION)
        workers = batch.twinx()
        workers.grid(visible=False)
        for name, label, colour in (
            ("wanted_workers", "workers wanted", ACCENT),
            ("world_size", "workers", GREEN),
        ):
            how: dict[str, Any] = {"color": colour, "lw": 1.2, "label": label}
            plot_points(workers, points[name], drawstyle="steps-post", **how)
        workers.set_ylim(bottom=0)
        workers.yaxis.set_major_locator(MaxNLocator(integer=True))
        workers.legend(loc="lower right")
        batch.set_title("Batch size and workers by epoch")
        return True

    return drawn("batch", draw, _HALF)


def robustness_figure(run: Run) -> Markup:
    """The metric on clean and on attacked samples by step; empty where no attack was evaluated."""
    rows = [row for row in run.metrics if number(row, "eval_adversarial_accuracy") is not None]

    def draw(figure: Figure) -> bool:
        if not rows:
            return False
        axes = figure.subplots()
        for name, label, colour in (
            ("eval_accuracy", "clean", EVALUATION),
            ("eval_adversarial_accuracy", "attacked", ACCENT),
        ):
            points = [(float(row["step"]), number(row, name)) for row in rows]
            known = [(x, y) for x, y in points if y is not None]
            plot_points(axes, known, "-o", color=colour, lw=1.5, ms=3, label=label)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("step")
        axes.legend(loc="best")
        axes.set_title("Test accuracy, clean and attacked")
        return True

    return drawn("robustness", draw, _HALF)


def _without_remainders(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Without the last batches of epochs, which are smaller than those before and after."""
    kept: list[tuple[float, float]] = []
    for place, (epoch, size) in enumerate(points):
        after = points[place + 1][1] if place + 1 < len(points) else size
        last = place + 1 == len(points)
        if not (kept and size < kept[-1][1] and (last or size < after)):
            kept.append((epoch, size))
    return kept


def _by_epoch(run: Run, name: str) -> list[tuple[float, float]]:
    """Values where they change, and the last one."""
    found: list[tuple[float, float]] = []
    for row in run.steps:
        epoch, value = number(row, "epoch"), number(row, name)
        if epoch is None or value is None:
            continue
        if found and found[-1][1] == value and len(found) > 1 and found[-2][1] == value:
            found[-1] = (epoch, value)
        else:
            found.append((epoch, value))
    return found
