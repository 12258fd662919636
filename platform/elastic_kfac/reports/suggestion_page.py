"""The page of a suggestion: the curves of all trials, the table, and the configuration to train with."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from elastic_kfac.config import dump_yaml
from elastic_kfac.reports.figures import ACCENT, EVALUATION, GRID, HALF, drawn, plain_log_scale
from elastic_kfac.reports.pages import Cell, Row, Table, code, page, write_page
from elastic_kfac.runs.suggestion import Suggestion, Trial

HEAD = "trial|changes to the given configuration|#seed|#steps|#training loss|#test loss|metrics|"
POINTS = 150
"""Most points of a curve."""


def write_suggestion_page(found: Suggestion, folder: Path) -> str | Path:
    """Writes `report.html` into the folder; returns where it is."""
    return write_page(folder, None, render_suggestion(found))


def render_suggestion(found: Suggestion) -> str:
    """The page of a suggestion; equal ones give equal text."""
    trials = [*found.trials, *(trial for pair in found.confirming for trial in pair)]
    table = Table.of("Trials", HEAD + "#CPU ms per step|ended early", [_cells(t) for t in trials])
    rows = [
        Row(row.cells, chosen=trial is found.winner)
        for row, trial in zip(table.rows, trials, strict=True)
    ]
    return page(
        "suggestion.html",
        title=found.config.model.name,
        headline=headline(found),
        found=found,
        figure=drawn("curves", lambda figure: _curves(figure, found), (2 * HALF[0], HALF[1])),
        table=Table(table.caption, table.columns, rows),
        yaml=dump_yaml(found.suggested.model_dump(mode="json")),
    )


def headline(found: Suggestion) -> str:
    """One sentence: what is suggested, and how it did with unseen seeds."""
    if not found.changes:
        return "Keep the configuration as given: nothing was better."
    text = ", ".join(f"{key}={value}" for key, value in found.changes.items())
    if not found.confirming:
        return f"Suggested, not tried with other seeds: {text}."
    better = sum(winner.score < given.score for given, winner in found.confirming)
    return f"Suggested: {text} (better with {better} of {len(found.confirming)} unseen seeds)."


def _cells(trial: Trial) -> list[object]:
    steps = len(trial.losses)
    train = trial.loss_at(steps, max(1, steps // 16))
    return [
        trial.label,
        code(", ".join(f"{key}={value}" for key, value in trial.changes.items()) or "none"),
        trial.seed,
        Cell(f"{steps:,}", steps),
        _number(train, ".4g"),
        _number(trial.test_loss, ".4g"),
        ", ".join(f"{name} {value:.4g}" for name, value in trial.metrics.items()),
        _number(1e3 * trial.cost_s if steps else None, ".3g"),
        trial.ended,
    ]


def _number(value: float | None, form: str) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell("–")
    return Cell(format(value, form), value)


def _curves(figure: Figure, found: Suggestion) -> None:
    axes = figure.subplots()
    for trial in found.trials:
        chosen, given = trial is found.winner, trial is found.given
        colour = ACCENT if chosen else EVALUATION if given else GRID
        label = f"winner: {trial.label}" if chosen else "as given" if given else None
        width = max(1, math.ceil(len(trial.losses) / POINTS))
        steps = range(width, len(trial.losses) + 1, width)
        means = [trial.loss_at(step, width) for step in steps]
        order = 3 if chosen or given else 1
        axes.plot(steps, means, color=colour, lw=1.4, label=label, zorder=order)
    axes.set_title("Training loss over steps, all trials of the search")
    axes.set_xlabel("step")
    if all(loss > 0 for trial in found.trials for loss in trial.losses):
        plain_log_scale(axes)
    axes.legend(loc="best")
