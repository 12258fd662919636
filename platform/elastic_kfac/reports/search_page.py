"""The page of a search, while it runs and afterwards.

The order of its sections: the result in a sentence and a table, trials that went wrong, the
configuration to use, accuracy over time against the references, memory against time, the parameters,
their importance, when each trial ran, every trial with the file to save, and provenance.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from elastic_kfac.experiments.importance import FEWEST, RELIABLE, importances
from elastic_kfac.experiments.search_folder import (
    BEST,
    Experiment,
    choices,
    mapping,
    read_experiment,
)
from elastic_kfac.experiments.trials import WORDS, Point, Trial, is_real
from elastic_kfac.observability.quality import quality_of, shown_quality, worded
from elastic_kfac.reports.pages import Cell, Column, Row, Table, code, page, write_page, yaml_text
from elastic_kfac.reports.search_figures import (
    MIB,
    MOST_AXES,
    MOST_OTHERS,
    curves_figure,
    hours_name,
    hours_of,
    importance_figure,
    memory_name,
    memory_of,
    parallel_figure,
    pareto_figure,
    text_of,
    timeline_figure,
)
from elastic_kfac.runs.summary import duration

SECTIONS = {
    "result": "Result",
    "failures": "Failed, rejected, shared, pruned and stopped trials",
    "best": "Configuration to use",
    "curves": "Time to accuracy",
    "pareto": "Memory against time",
    "parameters": "Parameters",
    "importance": "Parameter importance",
    "timeline": "Timeline",
    "trials": "All trials",
    "provenance": "Provenance",
}
"""Identity and title of every section, in their order."""

LARGEST_CSV = 2_000_000
"""Bytes of `trials.csv` up to which the page carries it."""

_FAILURES = (
    ("failed", "Failed", "The search continued without them."),
    (
        "refused",
        "Rejected before the start",
        "Their configuration cannot run here; they cost no time.",
    ),
    (
        "shared",
        "Not trained, because another trial has the same training",
        "Placement changes only seconds: the fastest by the model was trained.",
    ),
    (
        "pruned",
        "Pruned, because a finished trial had beaten them",
        "What they had spent, or had to spend before their first evaluation, was no less than all that "
        "the named trial needed.",
    ),
    ("stopped", "Stopped early", "The scheduler gave their time to better ones."),
)


def write_search_page(folder: Path, out: str | Path | None = None) -> Path:
    """Writes `report.html` into the folder of a search, finished or not, or `out`; returns its path.

    Raises:
        UsageError: If the folder is not there, holds no search or cannot be written.
    """
    return Path(write_page(folder, out, render_search(read_experiment(folder))))


def render_search(experiment: Experiment) -> str:
    """The page of a search; equal searches give equal text."""
    found, count = importances(experiment)
    order = [each.parameter for each in found]
    order += [name for name in experiment.parameters if name not in order]
    return page(
        "search.html",
        script="search.js",
        title=experiment.name,
        headline=headline(experiment),
        tiles=_tiles(experiment),
        sections=SECTIONS,
        experiment=experiment,
        progress=progress_line(experiment),
        compared=_compared(experiment),
        points=_points(experiment),
        failures=_failures(experiment),
        best=_best(experiment),
        location=shlex.quote(experiment.location),
        config_file=shlex.quote(f"{experiment.location}/best_config.yaml"),
        no_best=no_best(experiment),
        by_seconds=curves_figure(experiment, "seconds"),
        by_step=curves_figure(experiment, "step"),
        most_others=MOST_OTHERS,
        pareto=pareto_figure(experiment, "memory"),
        hours=pareto_figure(experiment, "hours"),
        memory_name=memory_name(experiment),
        hours_name=hours_name(experiment),
        missed=sum(p.tried and p.value is None for p in experiment.points),
        parallel=parallel_figure(experiment, order[:MOST_AXES]),
        axes=order[:MOST_AXES],
        not_drawn=order[MOST_AXES:],
        ranges=_ranges(experiment),
        importance=importance_figure(found, count),
        shares=[f"{each.parameter} {each.share:.0%}" for each in found],
        ranked=count,
        fewest=FEWEST,
        reliable=RELIABLE,
        timeline=timeline_figure(experiment),
        resizes=_resizes(experiment),
        clones=[f"{t.id} from {t.parent}" for t in _children(experiment) if not _shares(t)],
        shared=[f"{t.id} with {t.parent}" for t in _children(experiment) if _shares(t)],
        trials=_trials(experiment),
        csv=experiment.csv if len(experiment.csv) <= LARGEST_CSV else None,
        facts=_facts(experiment),
        space=yaml_text(experiment.space) + "\n" if experiment.space else "",
    )


# ---- sentences -------------------------------------------------------------------------------


def headline(experiment: Experiment) -> str:
    """One sentence: what the best point reaches, how fast, and how that compares."""
    begun = {
        "running": "Still searching. ",
        "interrupted": "Interrupted. ",
        "failed": "The search itself failed. ",
    }.get(experiment.status, "")
    confirmed = experiment.confirmed.get(BEST)
    winner = experiment.best if confirmed is None or experiment.best is None else confirmed
    if winner is None or winner.value is None:
        return begun + no_best(experiment)
    of_training = " of training" if experiment.unit == "training seconds" else ""
    took = amount(experiment, winner.value) + of_training
    seed = "seed" if confirmed is None else "unseen seed"
    count, missed = len(winner.trials), len(winner.trials) - len(winner.values)
    detail = f"one {seed}" if count < 2 else f"median of {count} {seed}s"
    detail += f", {missed} missed it" if count > 1 and missed else ""
    sentence = f"The best configuration reaches {_target(experiment)} in {took} ({detail})"
    references = experiment.references if confirmed is None else experiment.confirmed
    parts = [
        _against(experiment, winner.value, name, point)
        for name, point in references.items()
        if name != BEST and point.tried
    ]
    if parts:
        sentence += ", " + " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
    return f"{begun}{sentence}."


def no_best(experiment: Experiment) -> str:
    """Why there is no best point that reached the target."""
    tried = [point for point in experiment.points if point.tried]
    if not tried:
        lost = experiment.trials.count("failed", "refused")
        if lost and lost == experiment.done and experiment.status != "running":
            return f"No trial finished: {lost} failed or were rejected; the reasons are below."
        return "No trial has finished yet."
    values = [a for p in tried if (a := p.median("best_value")) is not None]
    closest = max if experiment.direction == "max" else min
    shown = shown_quality(experiment.quality, closest(values)) if values else ""
    close = f"; the closest came to {shown}" if shown else ""
    return f"None of {len(tried)} points reached {_target(experiment)} within its budget{close}."


def progress_line(experiment: Experiment) -> str:
    """How far the search is."""
    text = f"· {experiment.done} of {experiment.total} trials done"
    if running := experiment.trials.count("running"):
        text += f", {running} running"
    states = ("failed", "refused", "shared", "pruned", "stopped")
    lost = [f"{n} {WORDS.get(s, s)}" for s in states if (n := experiment.trials.count(s))]
    return text + (f" ({', '.join(lost)})" if lost else "")


def amount(experiment: Experiment, value: float | None) -> str:
    """An objective with its unit; a dash for none."""
    if value is None:
        return "–"
    unit = experiment.unit
    if unit == "steps":
        return f"{value:,.0f} steps"
    words = unit.replace("seconds", "").strip()
    return duration(value) + (f" ({words})" if words not in ("", "training") else "")


def _target(experiment: Experiment) -> str:
    target = experiment.target
    return "the target" if target is None else worded(experiment.quality, target)


def _format(experiment: Experiment) -> str:
    return ".2%" if quality_of(experiment.quality).is_share else ".4g"


def _against(experiment: Experiment, value: float, name: str, point: Point) -> str:
    label = "the default configuration" if name == "default" else name
    if point.value is None:
        return f"{label} did not reach it"
    ratio = point.value / value if value > 0 else 1.0
    other = amount(experiment, point.value)
    is_steps = experiment.unit == "steps"
    if ratio >= 1.005:
        return f"{ratio:.2f} times {'fewer steps' if is_steps else 'faster'} than {label} ({other})"
    if ratio <= 0.995:
        return (
            f"{1 / ratio:.2f} times {'more steps' if is_steps else 'slower'} than {label} ({other})"
        )
    return f"no different from {label} ({other})"


def _children(experiment: Experiment) -> list[Trial]:
    return [trial for trial in experiment.trials.values() if trial.parent]


def _shares(trial: Trial) -> bool:
    """Whether a trial shares the training of its parent, instead of continuing its state."""
    return trial.status == "shared" or trial.run_folder == f"trials/{trial.parent}"


def _resizes(experiment: Experiment) -> list[str]:
    """World sizes of every trial whose workers changed."""
    return [
        f"{trial.id}: {' → '.join(map(str, [trial.resizes[0].before, *sizes]))}"
        for trial in experiment.trials.values()
        if (sizes := [change.after for change in trial.resizes])
    ]


# ---- tables ----------------------------------------------------------------------------------


def _tiles(experiment: Experiment) -> dict[str, str]:
    best, tried = experiment.best, [p for p in experiment.points if p.tried]
    reached = sum(point.value is not None for point in tried)
    return {
        "best, median": amount(experiment, best.value if best else None),
        f"target {quality_of(experiment.quality).label}": "–"
        if experiment.target is None
        else shown_quality(experiment.quality, experiment.target),
        "points that reached it": f"{reached} of {len(tried)}",
        "trials done": f"{experiment.done} of {experiment.total}",
        "failed": str(experiment.trials.count("failed")),
        "rejected": str(experiment.trials.count("refused")),
        "pruned": str(experiment.trials.count("pruned")),
        "stopped early": str(experiment.trials.count("stopped")),
    }


def _compared(experiment: Experiment) -> Table:
    """The best point and the references."""
    named: list[tuple[str, Point]] = []
    if experiment.best is not None:
        named.append((f"best: {experiment.best.representative.id}", experiment.best))
    named += list(experiment.references.items())
    named += [(f"{name}, unseen seeds", p) for name, p in experiment.confirmed.items()]
    rows = [_point_row(experiment, name, point, ()) for name, point in named]
    return Table("Best and references", _point_columns(experiment, ()), rows)


def _points(experiment: Experiment) -> Table:
    """Every point; failed and rejected ones included."""
    names, best = experiment.parameters, experiment.best
    rows = [
        _point_row(experiment, point.representative.id, point, names, chosen=point is best)
        for point in experiment.points
    ]
    return Table("All searched points", _point_columns(experiment, names), rows, sortable=True)


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
        Column("trial" if names else "point"),
        Column(f"{experiment.unit} to the target", is_number=True, help=experiment.metric),
        Column("reached", is_number=True, help="seeds that reached the target"),
        Column("state"),
        *values,
        Column(
            f"best {quality_of(experiment.quality).label}",
            is_number=True,
            help="median of the seeds",
        ),
        Column("steps", is_number=True, help="median of the seeds"),
        Column("CPU seconds", is_number=True, help="all processes of the trial; median"),
        Column(hours_name(experiment), is_number=True, help="median of the seeds"),
        Column(memory_name(experiment).lower(), is_number=True, help="median of the seeds"),
    ]


def _point_row(
    experiment: Experiment, label: str, point: Point, names: Sequence[str], *, chosen: bool = False
) -> Row:
    memory = memory_of(experiment, point)
    count = len(point.values)
    states = sorted({trial.status for trial in point.trials})
    cells = [
        Cell(label),
        Cell(_spread(experiment, point), point.value),
        # Of a shared training it is told where it was done.
        Cell("–" if states == ["shared"] else f"{count} of {len(point.trials)}", float(count)),
        Cell(Markup(" ").join(_badge(state) for state in states), css="state-cell"),
    ]
    for name in names:
        value = point.parameters.get(name)
        cells.append(Cell(text_of(value), float(value) if is_real(value) else None))
    cells += [
        _number(point.median("best_value"), _format(experiment)),
        _number(point.median("steps"), ",.0f"),
        _number(point.median("cpu_seconds"), ",.1f"),
        _number(hours_of(experiment, point), ".3g"),
        Cell("–" if memory is None else f"{memory / MIB:,.0f} MiB", memory),
    ]
    return Row(cells, point.representative.index, chosen)


def _spread(experiment: Experiment, point: Point) -> str:
    """The median with the range of the seeds that reached the target."""
    if point.value is None:
        return "> budget" if point.tried else "–"
    text, values = amount(experiment, point.value), point.values
    if len(point.trials) < 2:
        return text
    form = ",.0f" if experiment.unit == "steps" else ".3g"
    return f"{text} [{values[0]:{form}}–{values[-1]:{form}}]"


def _failures(experiment: Experiment) -> list[tuple[Table, int, str]]:
    """Trials that ended without a result by the way they ended: table, count, note."""
    found = []
    for status, title, note in _FAILURES:
        alike: dict[tuple[str, str, str], list[Trial]] = {}
        for trial in experiment.trials.values():
            if trial.status == status:
                alike.setdefault((trial.stage, trial.point, trial.reason), []).append(trial)
        rows = [
            Row(
                [
                    Cell(Markup("<br>").join(trial.id for trial in trials)),
                    Cell(reason or "no reason was recorded", css="why"),
                    Cell(", ".join(str(trial.seed) for trial in trials)),
                    Cell(_pairs(trials[0]), css="why"),
                ],
                trials[0].index,
            )
            for (_, _, reason), trials in alike.items()
        ]
        columns = [Column(name) for name in ("trial", "reason", "seeds", "parameters")]
        if rows:
            found.append((Table(title, columns, rows), experiment.trials.count(status), note))
    return found


def _best(experiment: Experiment) -> Table | None:
    """The values of the best point and the default ones."""
    if experiment.best is None:
        return None
    default = mapping(mapping(experiment.about.get("references")).get("default")).get("config")
    rows = []
    for name, value in experiment.best.parameters.items():
        before: Any = default
        for key in name.split("."):
            before = before[key] if isinstance(before, dict) and key in before else _UNKNOWN
        shown = "–" if before is _UNKNOWN else text_of(before)
        rows.append([code(text) for text in (name, text_of(value), shown)])
    return Table.of("Best point and default", "parameter|best|default", rows)


def _ranges(experiment: Experiment) -> Table:
    space = mapping(experiment.space.get("parameters"))
    rows = [[code(name), _range(space.get(name))] for name in experiment.parameters]
    return Table.of("Searched ranges", "parameter|values", rows)


def _trials(experiment: Experiment) -> Table:
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
        Column(f"best {quality_of(experiment.quality).label}", is_number=True),
        Column("resizes", is_number=True),
        Column("run folder"),
    ]
    rows = [_trial_row(experiment, trial) for trial in experiment.trials.values()]
    return Table("All trials", columns, rows, sortable=True)


def _trial_row(experiment: Experiment, trial: Trial) -> Row:
    numbers, missed = trial.numbers.get, trial.ended and trial.value is None
    cells = [
        Cell(trial.id),
        Cell(trial.stage),
        Cell(_badge(trial.status)),
        Cell(trial.seed, float(trial.seed)),
        Cell("not reached" if missed else amount(experiment, trial.value), trial.value),
        _number(numbers("train_time_s"), ",.1f"),
        _number(numbers("time_to_accuracy_s"), ",.1f"),
        _number(numbers("worker_seconds"), ",.1f"),
        _number(numbers("cpu_seconds"), ",.1f"),
        _number(numbers("steps"), ",.0f"),
        _number(numbers("best_value"), _format(experiment)),
        Cell(len(trial.resizes), float(len(trial.resizes))),
        Cell(_run_link(experiment, trial)),
    ]
    return Row(cells, trial.index)


def _run_link(experiment: Experiment, trial: Trial) -> Markup | str:
    if not trial.run_folder:
        return "–"
    where, root = code(trial.run_folder), experiment.folder.resolve()
    if "\0" in trial.run_folder:
        return where
    report = (experiment.folder / trial.run_folder / "report.html").resolve()
    if not report.is_relative_to(root) or not report.is_file():
        return where
    path = quote(report.relative_to(root).as_posix())
    return Markup('<a href="./{}">{}</a>').format(path, where)


def _facts(experiment: Experiment) -> dict[str, Any]:
    about, trials = experiment.about, experiment.trials.values()
    facts: dict[str, Any] = {f"hardware: {k}": v for k, v in mapping(about.get("hardware")).items()}
    facts |= dict(mapping(about.get("versions")))
    facts["seeds"] = ", ".join(map(str, sorted({t.seed for t in trials}))) or "none yet"
    facts["objective"] = f"{experiment.metric} ({experiment.unit}), smaller is better"
    started, ends = about.get("started"), [trial.numbers.get("ended", 0.0) for trial in trials]
    if isinstance(started, int | float) and ends and max(ends) > started:
        facts["duration"] = f"{duration(max(ends) - started)} until the latest end of a trial"
    return facts


_UNKNOWN = object()


def _range(parameter: Any) -> str:
    listed = choices(parameter)
    if listed is not None:
        return "one of " + ", ".join(text_of(value) for value in listed)
    for kind, words in (("uniform", ""), ("loguniform", ", logarithmic"), ("randint", ", whole")):
        ends = mapping(parameter).get(kind)
        if isinstance(ends, list | tuple) and len(ends) == 2:
            return f"{text_of(ends[0])} to {text_of(ends[1])}{words}"
    return "unknown"


def _number(value: float | None, form: str) -> Cell:
    return Cell("–" if value is None else format(value, form), value)


def _badge(status: str) -> Markup:
    css = {"finished": " good", "failed": " bad", "refused": " bad"}.get(status, "")
    return Markup('<span class="kind{}">{}</span>').format(css, WORDS.get(status, status))


def _pairs(trial: Trial) -> Markup:
    return code(", ".join(f"{key}={text_of(value)}" for key, value in trial.parameters.items()))
