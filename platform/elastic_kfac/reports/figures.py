"""The parts that all figures share: style, colours, axes, and SVG text that is equal for equal input."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

INK, SOFT, GRID = "#1f2933", "#616e7c", "#e4e7eb"
TRAINING, EVALUATION, ACCENT, GREEN = "#9fb3c8", "#0b69a3", "#c4580f", "#5b8c5a"
HALF = (5.5, 3.4)
"""Size of a figure at half the width of the page, in inches."""

STYLE = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": SOFT,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": INK,
    "text.parse_math": False,
}
"""Names come from users: a $ in one begins no formula."""


def drawn(
    name: str,
    draw: Callable[[Figure], object],
    size: tuple[float, float] = HALF,
    **style: Any,
) -> Markup:
    """A figure as an `<svg>` element; empty if `draw` returns False.

    Args:
        name: Makes identifiers differ between the figures of a page.
        size: Width and height in inches.
        style: Further settings of matplotlib, with `__` for a dot.
    """
    settings = {key.replace("__", "."): value for key, value in style.items()}
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name, **settings}):
        figure = Figure(figsize=size, layout="constrained")
        if draw(figure) is False:
            return Markup("")
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # The names of groups repeat from figure to figure, and nothing refers to them.
    return Markup(re.sub(r' id="[\w.]+_\d+"', "", text[text.index("<svg") :]).strip())


def titled(svg: Markup, titles: dict[str, tuple[int, str]]) -> Markup:
    """Connects marks with trials: `data-t` holds the trial's index, `<title>` what a pointer shows.

    Args:
        titles: Index and words by the `gid` of a mark.
    """
    for mark, (index, words) in titles.items():
        group = f'<g id="{mark}" data-t="{index}"><title>{escape(words)}</title>'
        svg = Markup(str(svg).replace(f'<g id="{mark}">', group, 1))
    return svg


def plain_log_scale(axes: Axes) -> None:
    """A logarithmic vertical axis with plain numbers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    narrow = high / low < 100
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def horizontal_log_scale(axes: Axes) -> None:
    """A logarithmic horizontal axis with plain numbers."""
    low, high = axes.get_xlim()
    axes.set_xscale("log")
    if low <= 0:
        positive = [
            x for line in axes.lines for x in map(float, np.asarray(line.get_xdata())) if x > 0
        ]
        axes.set_xlim(min(positive) * 0.9, high)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def mark_target(
    axes: Axes, target: float | None, *, at_left: bool = False, is_share: bool = True
) -> None:
    """A dashed line at the target, with its value."""
    if target is None:
        return
    colour = SOFT if at_left else ACCENT
    axes.axhline(target, color=colour, lw=1, ls=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"target {target:.1%}" if is_share else f"target {target:.4g}",
        (0.01 if at_left else 0.995, target),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        xytext=(0, 3 if at_left else -4),
        ha="left" if at_left else "right",
        va="bottom" if at_left else "top",
        color=colour,
        fontsize=8,
    )


def plot_points(
    axes: Axes, points: Sequence[tuple[float, float]], *marker: str, **how: Any
) -> None:
    """`axes.plot` of (x, y) pairs; nothing without any."""
    if points:
        axes.plot(*zip(*points, strict=True), *marker, **how)
