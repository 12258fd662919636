"""Figures of a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import pandas as pd  # type: ignore[import-untyped]
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

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
    mark_target,
    plain_log_scale,
    plot_points,
)
from elastic_kfac.runs.history import Row, Run, Segment, first_number, number
from elastic_kfac.runs.summary import duration

BAND = ("#f0e2c8", "#cfe3d4", "#c6dbef", "#dccfe8", "#f3cfd0", "#d5d8dc")
MAX_POINTS = 1500
_HALF = (5.5, 3.3)

Horizontal = Literal["step", "wall_time_s"]
Points = list[tuple[float, float]]


def learning_figure(run: Run) -> Markup:
    """The main metric and loss, over steps and over wall time, above a band of the world size."""

    def draw(figure: Figure) -> None:
        rows = figure.subplots(3, 2, sharex="col", sharey="row", height_ratios=(3, 3, 0.45))
        horizontals: tuple[Horizontal, ...] = ("step", "wall_time_s")
        for column, horizontal in enumerate(horizontals):
            quality, loss, band = (row[column] for row in rows)
            by = "step" if horizontal == "step" else "wall time"
            _draw_quality(quality, run, horizontal)
            values = [number(row, "loss") for row in run.steps]
            _line_and_trend(loss, run, horizontal, values, TRAINING, EVALUATION)
            if any(value is not None and value > 0 for value in values):
                plain_log_scale(loss)
            _draw_band(band, run, horizontal)
            for axes in (quality, loss):
                _mark_changes(axes, run, horizontal)
            label = quality_of(run.metric).label
            quality.set_title(f"{label[0].upper()}{label[1:]} by {by}")
            loss.set_title(f"Training loss by {by}")

    return drawn("learning", draw, (11, 6.2))


def throughput_figure(run: Run) -> Markup:
    """Samples per second over wall time."""

    def draw(figure: Figure) -> None:
        top, band = figure.subplots(2, 1, sharex=True, height_ratios=(5, 0.7))
        speed = [_samples_per_s(row) for row in run.steps]
        _line_and_trend(top, run, "wall_time_s", speed, TRAINING, EVALUATION)
        top.set_ylim(bottom=0)
        top.set_title("Throughput, samples per second")
        _mark_changes(top, run, "wall_time_s")
        _draw_band(band, run, "wall_time_s")

    return drawn("throughput", draw, _HALF)


def curvature_figure(run: Run) -> Markup:
    """Damping, learning rate and step scale by step, with the updates as ticks."""

    def draw(figure: Figure) -> None:
        top, ticks = figure.subplots(2, 1, sharex=True, height_ratios=(5, 0.9))
        curves = (
            ("damping", "damping", EVALUATION),
            ("lr", "learning rate", ACCENT),
            ("kl_clip_scale", "step scale", GREEN),
        )
        for key, label, colour in curves:
            values = [(float(row["step"]), number(row, key)) for row in run.steps]
            points = [(x, y) for x, y in values if y is not None and y > 0]
            plot_points(top, _thin(points), color=colour, lw=1.3, label=label)
        if top.lines:
            plain_log_scale(top)
            # A schedule that ends at zero would press everything else together.
            low, high = top.get_ylim()
            top.set_ylim(bottom=max(low, high * 1e-6))
            top.legend(loc="best")
        top.set_title("K-FAC by step")
        _mark_changes(top, run, "step")
        _draw_updates(ticks, run)

    return drawn("curvature", draw, _HALF)


def _draw_quality(axes: Axes, run: Run, horizontal: Horizontal) -> None:
    training = [number(row, run.metric) for row in run.steps]
    _line_and_trend(axes, run, horizontal, training, None, TRAINING, label="training batches")
    index = 0 if horizontal == "step" else 1
    points = [(float(each[index] or 0), each[2]) for each in run.evaluations]
    plot_points(axes, points, "-o", color=EVALUATION, lw=1.8, ms=3.2, label="test set")
    is_share = quality_of(run.metric).is_share
    mark_target(axes, run.target_value, is_share=is_share)
    if is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if axes.lines and is_share:
        axes.set_ylim(top=1.02)
    if axes.get_legend_handles_labels()[0] and horizontal == "step":
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.02))


def _draw_band(axes: Axes, run: Run, horizontal: Horizontal) -> None:
    sizes = sorted({segment.world_size for segment in run.segments})
    spans = [_span(segment, horizontal) for segment in run.segments]
    whole = max((end for _, end in spans), default=0.0) or 1.0
    for segment, (start, end) in zip(run.segments, spans, strict=True):
        colour = BAND[sizes.index(segment.world_size) % len(BAND)]
        axes.axvspan(start, end, color=colour, lw=0)
        share = (end - start) / whole
        text = f"{segment.world_size} worker" + ("s" if segment.world_size > 1 else "")
        if share > 0.04:
            axes.text(
                (start + end) / 2,
                0.47,
                text if share > 0.16 else str(segment.world_size),
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="center",
                color=INK,
                fontsize=8,
            )
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[["left"]].set_visible(False)
    axes.set_xlabel("step" if horizontal == "step" else "seconds since the start")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def _draw_updates(axes: Axes, run: Run) -> None:
    labels = ["inverse updates", "factor updates"]
    for height, key in enumerate(("inverse_updates", "factor_updates")):
        at = _update_steps(run, key)
        if at:
            axes.eventplot(
                [x for x, _ in _thin([(x, 0.0) for x in at])],
                lineoffsets=height,
                linelengths=0.7,
                linewidths=0.7,
                colors=SOFT if height else EVALUATION,
            )
    axes.set_ylim(-0.6, 1.6)
    axes.set_yticks([0, 1], labels)
    axes.grid(visible=False)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def _update_steps(run: Run, key: str) -> list[float]:
    counts = [(float(row["step"]), number(row, key)) for row in run.steps]
    if any(count is not None for _, count in counts):
        known = [(step, count) for step, count in counts if count is not None]
        return [b[0] for a, b in itertools.pairwise(known) if b[1] > a[1]]
    # The rows have no count: the configured interval gives the steps.
    kfac = run.config.get("kfac")
    interval = number(kfac, key.replace("updates", "update_steps")) if kfac else None
    if not interval:
        return []
    return [step for step, _ in counts if (step - 1) % interval == 0]


def _mark_changes(axes: Axes, run: Run, horizontal: Horizontal) -> None:
    for pause in run.pauses:
        x = pause.step - 0.5 if horizontal == "step" else pause.wall_s
        axes.axvline(x, color=INK, lw=1.2, ls=":", zorder=1)
        if horizontal == "wall_time_s":
            away = "" if pause.away_s is None else f" after {duration(pause.away_s)}"
            across = axes.get_xaxis_transform()
            axes.text(x, 0.98, f" continued{away}", transform=across, va="top", fontsize=7)
    for before, after in zip(run.segments, run.segments[1:], strict=False):
        start, end = _span(before, horizontal)[1], _span(after, horizontal)[0]
        if horizontal == "wall_time_s":
            axes.axvspan(start, end, color=GRID, lw=0, zorder=0)
        axes.axvline(end, color=SOFT, lw=0.9, ls=(0, (2, 2)), zorder=1)


def _span(segment: Segment, horizontal: Horizontal) -> tuple[float, float]:
    if horizontal == "step":
        return segment.first_step - 0.5, segment.last_step + 0.5
    return segment.first_wall_s, segment.last_wall_s


def _line_and_trend(
    axes: Axes,
    run: Run,
    horizontal: Horizontal,
    values: Sequence[float | None],
    line_colour: str | None,
    trend_colour: str,
    *,
    label: str | None = None,
) -> None:
    lines, trends = [], []
    for stretch in _stretches(run, horizontal, values):
        # A point that is not a number ends the line: nothing is drawn across time without steps.
        gap = (stretch[-1][0], math.nan)
        lines += [*stretch, gap]
        trends += [*_centred_median(stretch), gap]
    if not lines:
        return
    if line_colour is not None:
        axes.plot(*zip(*_thin(lines), strict=True), color=line_colour, lw=0.7)
    axes.plot(*zip(*_thin(trends), strict=True), color=trend_colour, lw=1.6, label=label)


def _stretches(run: Run, horizontal: Horizontal, values: Sequence[float | None]) -> list[Points]:
    found: list[Points] = []
    size: object = None
    pauses = [pause.step for pause in run.pauses]
    for row, value in zip(run.steps, values, strict=True):
        x = number(row, horizontal)
        if x is None or value is None:
            continue
        stretch = row.get("world_size"), sum(row["step"] >= step for step in pauses)
        if not found or stretch != size:
            found.append([])
        size = stretch
        found[-1].append((x, value))
    return found


def _centred_median(points: Points) -> Points:
    # Centred, because a look at the past alone lies above every falling loss; a median, because
    # one bad batch moves a mean by decades on a logarithmic axis.
    width = 2 * min(30, len(points) // 25) + 1
    values = pd.Series([y for _, y in points]).rolling(width, center=True, min_periods=1).median()
    return [(x, y) for (x, _), y in zip(points, values, strict=True)]


def _thin(points: Points) -> Points:
    stride = -(-len(points) // MAX_POINTS)
    if stride <= 1:
        return points
    return [*points[:-1:stride], points[-1]]


def _samples_per_s(row: Row) -> float | None:
    given = number(row, "samples_per_s")
    if given is not None:
        return given
    size, seconds = first_number(row, "global_batch_size"), first_number(row, "step_time_s")
    return size / seconds if size is not None and seconds else None
