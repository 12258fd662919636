"""Tables of a search: the best beside the references, every point, every trial."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from elastic_kfac.experiments.search_folder import Experiment, Point, Trial, is_real
from elastic_kfac.reports.run_page import escaped
from elastic_kfac.reports.search_figures import MIB, text_of
from elastic_kfac.reports.search_page import Cell, Column, Line, badge, download, table
from elastic_kfac.reports.search_words import amount, spread

LARGEST_CSV = 2_000_000
"""Bytes of `trials.csv` up to which the page carries it."""


def result_tables(experiment: Experiment) -> str:
    """The best beside the references, and every point; failed and refused ones included."""
    parts = []
    named: list[tuple[str, Point]] = []
    best = experiment.best
    if best is not None:
        named.append((f"best: {best.representative.id}", best))
    named += list(experiment.references.items())
    named += [(f"{name}, unseen seeds", p) for name, p in experiment.confirmed.items()]
    if named:
        lines = [_point_line(experiment, name, point, ()) for name, point in named]
        parts.append(table("Best and references", _point_columns(experiment, ()), lines))
        parts.append(f'<p class="note">{escaped(_how_sure(experiment))}</p>')
    names = experiment.parameters
    if experiment.points:
        lines = [
            _point_line(experiment, point.representative.id, point, names, chosen=point is best)
            for point in experiment.points
        ]
        parts.append("<h3>Every point that was searched</h3>")
        columns = _point_columns(experiment, names)
        parts.append(table("Every point that was searched", columns, lines, sortable=True))
        rule = str(experiment.about.get("rule_for_censored") or "").strip()
        parts.append(
            '<p class="note">A point stands with the median of its repeats (of an even number the '
            "worse in the middle); in brackets: the smallest and largest that reached the target. "
            f"“> budget”: the target was not reached. {escaped(rule)}</p>"
        )
    else:
        parts.append("<p>No trial has been planned yet.</p>")
    return "".join(parts)


def _point_columns(experiment: Experiment, names: Sequence[str]) -> list[Column]:
    values = [
        Column(
            name.partition(".")[2] or name,
            is_number=all(is_real(point.parameters.get(name)) for point in experiment.points),
            help=name,
        )
        for name in names
    ]
    return [
        Column("trial" if names else "what"),
        Column(f"{experiment.unit} to the target", is_number=True, help=experiment.metric),
        Column("reached", is_number=True, help="repeats that reached the target"),
        Column("state"),
        *values,
        Column("best accuracy", is_number=True, help="median of the repeats"),
        Column("steps", is_number=True, help="median of the repeats"),
        Column("CPU seconds", is_number=True, help="all processes of the trial; median"),
        Column("peak memory", is_number=True, help="median of the repeats"),
    ]


def _point_line(
    experiment: Experiment,
    label: str,
    point: Point,
    names: Sequence[str],
    *,
    chosen: bool = False,
) -> Line:
    trial = point.representative
    steps, cpu = point.median("steps"), point.median("cpu_seconds")
    accuracy, memory = point.median("best_accuracy"), point.median("peak_memory_bytes")
    count = len(point.values)
    states = sorted({trial.status for trial in point.trials})
    cells = [
        Cell(escaped(label)),
        Cell(escaped(spread(experiment, point)), point.value),
        Cell(f"{count} of {len(point.trials)}", float(count)),
        Cell(" ".join(badge(state) for state in states), css="state-cell"),
    ]
    for name in names:
        value = point.parameters.get(name)
        cells.append(Cell(escaped(text_of(value)), float(value) if is_real(value) else None))
    cells += [
        Cell("–" if accuracy is None else f"{accuracy:.2%}", accuracy),
        Cell("–" if steps is None else f"{steps:,.0f}", steps),
        Cell("–" if cpu is None else f"{cpu:,.1f}", cpu),
        Cell("–" if memory is None else f"{memory / MIB:,.0f} MiB", memory),
    ]
    return Line(cells, trial=trial.index, chosen=chosen)


def _how_sure(experiment: Experiment) -> str:
    seeds = "1 seed per point"
    if experiment.repeats > 1:
        seeds = f"{experiment.repeats} seeds per point whose first one finished"
    if experiment.confirmed:
        return (
            f"The search used {seeds}. The rows of unseen seeds repeat the winner and the "
            "references with seeds that had no part in choosing it: they are the fair comparison."
        )
    return (
        f"{seeds[0].upper()}{seeds[1:]}. The winner was chosen by these same trials, so its figure "
        "is on the bright side; “confirm: N” in the space repeats it with unseen seeds."
    )


def trials_table(experiment: Experiment) -> str:
    """Every trial, with the file to save."""
    if not experiment.trials:
        return "<p>trials.csv is not there yet, or empty.</p>"
    columns = [
        Column("trial"),
        Column("stage"),
        Column("state"),
        Column("seed", is_number=True),
        Column(f"{experiment.unit} to the target", is_number=True, help=experiment.metric),
        Column("training s", is_number=True, help="all seconds of training"),
        Column("wall clock s to the target", is_number=True, help="downtime included"),
        Column("worker-seconds", is_number=True),
        Column("CPU seconds", is_number=True),
        Column("steps", is_number=True),
        Column("best accuracy", is_number=True),
        Column("resizes", is_number=True),
        Column("run folder"),
    ]
    lines = [_trial_line(experiment, trial) for trial in experiment.trials]
    save = "<p>trials.csv is too large to be put into this page.</p>"
    if len(experiment.csv) <= LARGEST_CSV:
        save = download("trials.csv", experiment.csv, "text/csv")
    return save + table("All trials", columns, lines, sortable=True)


def _trial_line(experiment: Experiment, trial: Trial) -> Line:
    def seconds(name: str) -> Cell:
        value = trial.numbers.get(name)
        return Cell("–" if value is None else f"{value:,.1f}", value)

    steps, accuracy = trial.numbers.get("steps"), trial.numbers.get("best_accuracy")
    value = amount(experiment, trial.value) if trial.reached or not trial.ended else "not reached"
    seed = float(trial.seed) if trial.seed.isdigit() else None
    cells = [
        Cell(escaped(trial.id)),
        Cell(escaped(trial.stage)),
        Cell(badge(trial.status)),
        Cell(escaped(trial.seed), seed),
        Cell(escaped(value), trial.value),
        seconds("train_time_s"),
        seconds("time_to_accuracy_s"),
        seconds("worker_seconds"),
        seconds("cpu_seconds"),
        Cell("–" if steps is None else f"{steps:,.0f}", steps),
        Cell("–" if accuracy is None else f"{accuracy:.2%}", accuracy),
        Cell(str(len(trial.changes)), float(len(trial.changes))),
        Cell(_run_link(experiment, trial)),
    ]
    return Line(cells, trial=trial.index)


def _run_link(experiment: Experiment, trial: Trial) -> str:
    where = f"<code>{escaped(trial.run_folder)}</code>" if trial.run_folder else "–"
    report = (experiment.folder / trial.run_folder / "report.html").resolve()
    inside = report.is_relative_to(experiment.folder.resolve())
    if not trial.run_folder or not inside or not report.is_file():
        return where
    path = report.relative_to(experiment.folder.resolve()).as_posix()
    return f'<a href="./{quote(path)}">{where}</a>'
