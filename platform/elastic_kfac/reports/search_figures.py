"""Figures of a search.

The marks of a trial carry `data-t` (the trial's index) and a `<title>`, so that a page can highlight
the same trial in all figures, and a pointer shows which trial a mark belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from elastic_kfac.experiments.importance import Importance
from elastic_kfac.experiments.search_folder import Experiment, mapping
from elastic_kfac.experiments.trials import Point, Trial, is_real
from elastic_kfac.observability.quality import quality_of
from elastic_kfac.reports.figures import (
    ACCENT,
    EVALUATION,
    GREEN,
    GRID,
    INK,
    SOFT,
    TRAINING,
    drawn,
    horizontal_log_scale,
    mark_target,
    plot_points,
    titled,
)
from elastic_kfac.runs.summary import duration

MIB = 2**20
MOST_OTHERS = 40
"""Other trials drawn; more would only be grey."""
MOST_AXES = 8
REFERENCES = ("#1f2933", "#8d4a97", "#5b8c5a", "#b7950b")
DASHES = ((0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)), (0, (1, 1)))
STATUS: Mapping[str, str] = {
    "finished": EVALUATION,
    "running": GREEN,
    "stopped": TRAINING,
    "pruned": TRAINING,
    "failed": "#b83280",
    "pending": GRID,
}
_LOG_FROM = 8.0
_SIZE = (5.6, 3.7)

Axis = Literal["seconds", "step"]
"""The horizontal axis of a curve: a field of `Evaluation`."""

Titles = dict[str, tuple[int, str]]


def curves_figure(experiment: Experiment, axis: Axis) -> Markup:
    """The metric of the best point, the references and the others; empty if there is none."""
    titles: Titles = {}
    best = experiment.best

    def draw(figure: Figure) -> bool:
        axes, count = figure.subplots(), 0
        others = [p.representative for p in experiment.points if p is not best]
        for trial in [t for t in others if t.evaluations][:MOST_OTHERS]:
            label = None if count else "other trials"
            count += _curve(axes, trial, axis, titles, TRAINING, 0.8, label=label)
        for index, (name, point) in enumerate(experiment.references.items()):
            colour = REFERENCES[index % len(REFERENCES)]
            dashes = DASHES[index % len(DASHES)]
            count += _curves(axes, point, axis, titles, colour, name, dashes)
        if best is not None:
            label = f"best ({best.representative.id})"
            count += _curves(axes, best, axis, titles, ACCENT, label, "solid")
        is_share = quality_of(experiment.quality).is_share
        mark_target(axes, experiment.target, at_left=True, is_share=is_share)
        if is_share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        trials = experiment.trials.values()
        ends = [getattr(t.evaluations[-1], axis) for t in trials if t.evaluations]
        if ends and min(ends) > 0 and max(ends) / min(ends) > _LOG_FROM:
            horizontal_log_scale(axes)
        axes.set_xlabel("training seconds" if axis == "seconds" else "steps")
        label = quality_of(experiment.quality).label
        by = "time" if axis == "seconds" else "step"
        axes.set_title(f"{label[0].upper()}{label[1:]} by {by}")
        if count:
            axes.legend(loc="lower right")
        return bool(count)

    return titled(drawn(f"curves-{axis}", draw, _SIZE), titles)


def hours_name(experiment: Experiment) -> str:
    """What the time of all workers together is called."""
    resources = mapping(mapping(experiment.space.get("base")).get("resources"))
    return "GPU-hours" if resources.get("use_gpu") else "worker-hours"


def hours_of(experiment: Experiment, point: Point) -> float | None:
    """Time of all workers together, h; the median of the seeds."""
    seconds = point.median("worker_seconds")
    if _is_emulated(experiment):
        size = mapping(experiment.space.get("links")).get("world_size")
        seconds = point.value * size if point.value is not None and size else None
    return None if seconds is None else seconds / 3600


def memory_name(experiment: Experiment) -> str:
    """What the memory of a point is called."""
    return "Memory by the model" if _is_emulated(experiment) else "Peak memory"


def memory_of(experiment: Experiment, point: Point) -> float | None:
    """Memory of a point's largest worker, bytes; of the model where the cluster is not there, which tells
    that of every placement, trained or not."""
    return point.median("model_memory_bytes" if _is_emulated(experiment) else "peak_memory_bytes")


def _is_emulated(experiment: Experiment) -> bool:
    return experiment.metric == "emulated_time_to_accuracy_s"


def pareto_figure(experiment: Experiment, against: Literal["memory", "hours"]) -> Markup:
    """Peak memory or the workers' hours over the objective, with the front; empty if no point has
    both."""
    is_memory = against == "memory"
    named = [(point, "") for point in experiment.points if point.tried]
    named += [(p, name) for name, p in experiment.references.items() if p.tried]
    both = [
        (*at, p, name) for p, name in named if (at := _cost(experiment, p, against)) is not None
    ]
    if not both:
        return Markup("")
    titles: Titles = {}
    name_of = "pareto" if is_memory else "hours"
    unit = "MiB" if is_memory else hours_name(experiment)
    form = ",.0f" if is_memory else ".3g"
    front = pareto_front([(x, y) for x, y, _, _ in both])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.step(*zip(*front, strict=True), where="post", color=EVALUATION, lw=1.4, label="front")
        for x, y, point, name in both:
            trial, is_best = point.representative, point is experiment.best
            mark = f"{name_of}-{trial.index}"
            colour = ACCENT if is_best else INK if name else TRAINING
            if (x, y) in front and not (is_best or name):
                colour = EVALUATION
            marker = "*" if is_best else "D" if name else "o"
            (dot,) = axes.plot(x, y, marker, color=colour, ms=12 if is_best else 6, zorder=3)
            dot.set_gid(mark)
            label = "best" if is_best else name
            titles[mark] = (trial.index, f"{label or trial.id}: {x:,.4g}, {y:{form}} {unit}")
            if label:
                # Away from the nearest side, so that the text stays inside.
                axes.annotate(
                    label, (x, y), (7, 6), textcoords="offset points", color=INK, fontsize=8
                )
        across = [x for x, *_ in both]
        if min(across) > 0 and max(across) / min(across) > _LOG_FROM:
            horizontal_log_scale(axes)
        axes.margins(0.14)
        axes.set_xlabel(f"{experiment.unit} to the target (median of the seeds)")
        axes.set_title(
            f"{memory_name(experiment)}, MiB" if is_memory else unit[0].upper() + unit[1:]
        )
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:{form}}"))
        axes.legend(loc="best")

    return titled(drawn(name_of, draw, _SIZE), titles)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in both coordinates, by ascending first coordinate."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def parallel_figure(experiment: Experiment, shown: Sequence[str]) -> Markup:
    """One line per point through its parameters to its objective; empty for fewer than two."""
    points = [point for point in experiment.points if point.tried]
    if len(points) < 2 or not shown:
        return Markup("")
    titles: Titles = {}
    columns: list[list[Any]] = [[p.parameters.get(name) for p in points] for name in shown]
    columns.append([point.value for point in points])
    names = [*shown, experiment.unit]
    size = (max(6.4, 1.75 * len(names)), 4.0)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        heights = []
        for x, (name, values) in enumerate(zip(names, columns, strict=True)):
            at, ticks = _axis(values, censored=name is names[-1] and x == len(names) - 1)
            heights.append(at)
            axes.axvline(x, color=SOFT, lw=0.8, zorder=1)
            for height, text in ticks:
                axes.plot([x - 0.015, x + 0.015], [height, height], color=SOFT, lw=0.8, zorder=1)
                box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.6}
                place = (x + 0.03, height)
                axes.text(*place, text, color=INK, fontsize=7.5, va="center", zorder=5, bbox=box)
        for rank, point in reversed(list(enumerate(points))):
            trial, is_best = point.representative, point is experiment.best
            mark = f"parallel-{trial.index}"
            reached = point.value is not None
            colour = ACCENT if is_best else EVALUATION if reached else SOFT
            strength = 1.0 if is_best else 0.85 - 0.6 * rank / len(points)
            axes.plot(
                range(len(names)),
                [column[rank] for column in heights],
                color=colour,
                alpha=strength,
                lw=2.4 if is_best else 1.2,
                ls="solid" if reached else (0, (3, 2)),
                zorder=4 if is_best else 2,
                gid=mark,
            )
            words = ", ".join(f"{key}={text_of(v)}" for key, v in point.parameters.items())
            titles[mark] = (trial.index, f"{trial.id}: {words}")
        axes.set_xlim(-0.1, len(names) - 0.55)
        axes.set_ylim(-0.06, 1.06)
        axes.set_yticks([])
        labels = [name.replace(".", ".\n", 1) for name in shown]
        axes.set_xticks(range(len(names)), [*labels, experiment.unit.replace(" ", "\n", 1)])
        axes.tick_params(axis="x", length=0, labelsize=8.5, labelcolor=INK)
        axes.spines[:].set_visible(False)

    return titled(drawn("parallel", draw, size, axes__grid=False), titles)


def importance_figure(found: Sequence[Importance], count: int) -> Markup:
    """Shares as bars, with the share that chance alone would give."""
    if not found:
        return Markup("")

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row, each in enumerate(found):
            axes.barh(row, each.share, height=0.6, color=EVALUATION, zorder=2)
            axes.plot([each.chance] * 2, [row - 0.42, row + 0.42], color=ACCENT, lw=2, zorder=3)
            axes.text(
                each.share + 0.015, row, f"{each.share:.0%}", va="center", fontsize=8, color=INK
            )
        axes.set_yticks(range(len(found)), [each.parameter for each in found])
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_title(f"Share of the ranking, n = {count} (line: chance)")

    return drawn("importance", draw, (5.6, 1.1 + 0.38 * len(found)))


def timeline_figure(experiment: Experiment) -> Markup:
    """When every trial ran, how it ended, and where its workers changed."""
    begun = [trial for trial in experiment.trials.values() if "started" in trial.numbers]
    if not begun:
        return Markup("")
    titles: Titles = {}
    now = max(
        [t.numbers.get("ended", t.numbers["started"]) for t in begun]
        + [c.time for t in begun for c in t.resizes]
        + [float(experiment.about.get("updated") or 0.0)]
    )
    origin = min(trial.numbers["started"] for trial in begun)
    unit, seconds = ("minutes", 60.0) if now - origin > 180 else ("seconds", 1.0)
    step = 0.2 if len(begun) <= 60 else 0.06

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row, trial in enumerate(begun):
            start = trial.numbers["started"]
            end = max(trial.numbers.get("ended", now if not trial.ended else start), start)
            mark = f"timeline-{trial.index}"
            axes.barh(
                row,
                max((end - start) / seconds, (now - origin) / seconds / 400),
                left=(start - origin) / seconds,
                height=0.72,
                color=STATUS.get(trial.status, SOFT),
                label=trial.status,
                gid=mark,
            )[0].set_gid(mark)
            why = f", {trial.reason}" if trial.reason else ""
            titles[mark] = (
                trial.index,
                f"{trial.id}: {trial.status} after {duration(end - start)}{why}",
            )
            for change in trial.resizes:
                at = (change.time - origin) / seconds
                axes.plot([at, at], [row - 0.45, row + 0.45], color=INK, lw=1.6, label="resize")
        _one_label_each(axes)
        if len(begun) <= 60:
            axes.set_yticks(range(len(begun)), [_short(trial.id) for trial in begun])
            axes.tick_params(axis="y", labelsize=7.5, labelcolor=INK, length=0)
        else:
            axes.set_yticks([])
        axes.set_ylim(len(begun) - 0.3, -0.7)
        axes.set_axisbelow(True)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{unit} since the first trial began")

    return titled(drawn("timeline", draw, (11, 1.1 + step * len(begun))), titles)


def text_of(value: Any) -> str:
    """A parameter's value as people write it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def _curves(
    axes: Axes,
    point: Point,
    axis: Axis,
    titles: Titles,
    colour: str,
    label: str,
    dashes: Any,
) -> int:
    shown = [trial for trial in point.trials if trial.evaluations]
    # Where the median repeat has not begun yet, another one bears the name.
    middle = point.representative if point.representative.evaluations or not shown else shown[0]
    drawn = 0
    for trial in [t for t in shown if t is not middle]:
        drawn += _curve(axes, trial, axis, titles, colour, 0.9, dashes, alpha=0.45)
    return drawn + _curve(axes, middle, axis, titles, colour, 2.2, dashes, label=label)


def _curve(
    axes: Axes,
    trial: Trial,
    axis: Axis,
    titles: Titles,
    colour: str,
    width: float,
    dashes: Any = "solid",
    *,
    label: str | None = None,
    alpha: float = 1.0,
) -> int:
    if not trial.evaluations:
        return 0
    points = [(getattr(each, axis), each.value) for each in trial.evaluations]
    mark = f"curves-{axis}-{trial.index}"
    plot_points(axes, points, color=colour, lw=width, ls=dashes, alpha=alpha, gid=mark)
    # A dot ends a trial that reached the target, a cross another one.
    if trial.ended:
        end = "o" if trial.reached else "x"
        plot_points(axes, points[-1:], end, color=colour, alpha=alpha, ms=4)
    if label is not None:
        axes.plot([], [], color=colour, lw=width, ls=dashes, label=_short(label))
    best = max(accuracy for _, accuracy in points)
    titles[mark] = (trial.index, f"{trial.id}: best {best:.2%}, {trial.status}")
    return 1


def _cost(experiment: Experiment, point: Point, against: str) -> tuple[float, float] | None:
    if against == "hours":
        cost = hours_of(experiment, point)
    else:
        memory = memory_of(experiment, point)
        cost = None if memory is None else memory / MIB
    return None if cost is None or point.value is None else (point.value, cost)


def _axis(values: Sequence[Any], censored: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights 0 to 1 of the values of one parameter, and its ticks."""
    known = [value for value in values if is_real(value)]
    missing = len(known) < len(values)
    if (missing and not censored) or not known:
        names = sorted({text_of(value) for value in values})
        if censored:
            names = ["not reached"]
            return [1.0] * len(values), [(1.0, "not reached")]
        spot = {name: (i + 0.5) / len(names) for i, name in enumerate(names)}
        ticks = [(height, _short(name, 14)) for name, height in spot.items()]
        return [spot[text_of(value)] for value in values], ticks
    low, high = float(min(known)), float(max(known))
    log = low > 0 and high / low > _LOG_FROM
    top = 0.86 if censored and missing else 1.0

    def height(value: float) -> float:
        if high == low:
            return top / 2
        if log:
            return top * math.log(value / low) / math.log(high / low)
        return top * (value - low) / (high - low)

    whole = all(isinstance(value, int) for value in known)
    different = sorted(set(known))
    if high == low or len(different) <= 5:
        marks = [float(value) for value in different]
    elif log:
        marks = [low * (high / low) ** (i / 4) for i in range(5)]
    else:
        marks = [low + (high - low) * i / 4 for i in range(5)]
    ticks = [(height(m), f"{m:,.0f}" if whole else f"{m:.3g}") for m in marks]
    if censored and missing:
        ticks.append((1.0, "not reached"))
    return [1.0 if value is None else height(float(value)) for value in values], ticks


def _one_label_each(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(
        unique.values(), unique.keys(), loc="lower right", bbox_to_anchor=(1, 1), ncols=len(unique)
    )


def _short(text: str, most: int = 26) -> str:
    text = text.lstrip("_") or "?"  # matplotlib hides labels that begin with an underscore
    return text if len(text) <= most else text[: most - 1] + "…"
