"""What `analyze`, the probes and the analyses during training have found, as figures and a section.

The figures are those of the source (spec 6): the largest eigenvalues of the whole and of one sample,
the loss along the dominant eigenvector on both splits, the spectral density, and the dominant
eigenvalue beside the gradient norm over epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from elastic_kfac.reports.figures import (
    ACCENT,
    EVALUATION,
    INK,
    SOFT,
    STYLE,
    plain_log_scale,
    svg_text,
)
from elastic_kfac.reports.run_page import escaped, section
from elastic_kfac.runs.history import Run, first_number, number

Found = Mapping[str, Any]
GREEN = "#5b8c5a"
_SIZE = (5.5, 3.4)
_SHOWN_RANGE = 1e6
"""Decades below the largest eigenvalue that are rounding, not curvature."""


def figures(found: Found) -> dict[str, str]:
    """SVG texts of one analysis, by name; a probe has none."""
    drawn: dict[str, str] = {}
    if found.get("kind") != "curvature":
        return drawn
    if len(found.get("spectrum", {}).get("eigenvalues", ())) > 1:
        drawn["spectrum"] = _drawn("spectrum", lambda axes: _draw_spectrum(axes, found))
    if found.get("landscape"):
        drawn["landscape"] = _drawn("landscape", lambda axes: _draw_landscape(axes, found))
    if found.get("density"):
        drawn["density"] = _drawn("density", lambda axes: _draw_density(axes, found))
    return drawn


def course_figure(run: Run) -> str | None:
    """λ_1 and the gradient norm over epochs; None when they were not measured during training."""
    largest = _column(run, "top_eigenvalue", "hessian_eigenvalue")
    if not largest:
        return None
    return _drawn("course", lambda axes: _draw_course(axes, run, largest))


def analysis_sections(run: Run) -> list[str]:
    """The part of a run's page about its loss surface; empty when nothing was analysed."""
    newest = _newest_of_each(run.analyses)
    panels = []
    course = course_figure(run)
    if course is not None:
        panels.append(course)
    parts = []
    notes: list[str] = []
    for found in newest:
        if found.get("kind") == "curvature":
            panels += figures(found).values()
            notes.append(_caption(found))
    if panels:
        boxes = "".join(section("", panel) for panel in panels)
        parts.append(
            section(
                "Loss surface", "".join(f'<p class="note">{note}</p>' for note in notes) or _COURSE
            )
            + f'<div class="pair">{boxes}</div>'
        )
    for found in newest:
        if found.get("kind") == "bias_variance":
            parts.append(section("Bias and variance", _bias_variance(found)))
        elif found.get("kind") == "low_rank":
            parts.append(section("Low-rank probe", _low_rank(found)))
    return parts


_COURSE = '<p class="note">Measured during training, on samples that are not augmented.</p>'


def _newest_of_each(analyses: Sequence[Found]) -> list[Found]:
    """The newest result of every kind and split: a page is about the end of a run."""
    newest: dict[tuple[object, object], Found] = {}
    for found in analyses:
        key = (found.get("kind"), found.get("split"))
        if key not in newest or found.get("step", 0) >= newest[key].get("step", 0):
            newest[key] = found
    return list(newest.values())


def _drawn(name: str, draw: Callable[[Axes], None]) -> str:
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": f"analysis-{name}"}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        draw(figure.subplots())
        return svg_text(figure)


def _draw_spectrum(axes: Axes, found: Found) -> None:
    whole, one = found["spectrum"], found.get("one_sample")
    biggest = max((abs(value) for value in whole["eigenvalues"]), default=0.0)
    if one:
        biggest = max(biggest, one["mean"][0])
        ranks = range(1, len(one["mean"]) + 1)
        floor = biggest / _SHOWN_RANGE
        low = [max(value, floor) for value in one["low"]]
        axes.fill_between(ranks, low, one["high"], color=ACCENT, alpha=0.15, lw=0)
        label = f"one sample (mean and 10–90 % of {one['samples']})"
        axes.plot(ranks, one["mean"], color=ACCENT, marker="o", ms=3, lw=1.2, label=label)
    series = [(whole, EVALUATION, "all samples")]
    if found.get("last_layer"):
        series.append((found["last_layer"], GREEN, "last layer's block"))
    for part, colour, label in series:
        values = part["eigenvalues"]
        ranks = range(1, len(values) + 1)
        axes.plot(ranks, [abs(v) for v in values], color=colour, lw=1.4, label=label)
        for sign, face in ((1, colour), (-1, "white")):
            points = [(r, abs(v)) for r, v in zip(ranks, values, strict=True) if v * sign > 0]
            if points:
                axes.plot(*zip(*points, strict=True), "o", ms=4, mfc=face, mec=colour, zorder=3)
    axes.set_title("Largest eigenvalues of the Hessian")
    axes.set_xlabel("rank by size (open circle: negative)")
    axes.set_ylabel("size")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    if biggest > 0:
        plain_log_scale(axes)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], biggest / _SHOWN_RANGE))
    axes.legend(loc="best")


def _draw_landscape(axes: Axes, found: Found) -> None:
    seen = found["landscape"]
    distances = seen["distances"]
    colours = dict(zip(seen["losses"], (EVALUATION, ACCENT, GREEN), strict=False))
    tops = []
    for name, losses in seen["losses"].items():
        points = [(d, v) for d, v in zip(distances, losses, strict=True) if v is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colours[name], lw=1.6, label=name)
            tops.append(max(v for _, v in points))
    own = seen["losses"].get(found.get("split"), [])
    middle = own[len(own) // 2] if len(own) % 2 else None
    if middle is not None and seen["curvature"] is not None:
        slope = seen["slope"] or 0.0
        parabola = [middle + slope * d + seen["curvature"] * d * d / 2 for d in distances]
        label = f"parabola of λ₁ = {seen['curvature']:.3g}"
        axes.plot(distances, parabola, color=INK, lw=1, ls=(0, (4, 3)), label=label)
    axes.axvline(0, color=SOFT, lw=0.8, ls=(0, (2, 2)), zorder=1)
    axes.set_title("Loss along the dominant eigenvector")
    axes.set_xlabel("distance δ of θ + δ·v₁")
    axes.set_ylabel("mean loss")
    if axes.lines:
        axes.legend(loc="best")


def _draw_density(axes: Axes, found: Found) -> None:
    density = found["density"]
    grid, values = density["grid"], density["values"]
    # Between its masses a density of bells is 0 to rounding; what is below a millionth is not seen.
    peak = max(values, default=0.0)
    floor = peak / _SHOWN_RANGE
    axes.fill_between(
        grid, [max(v, floor) for v in values], floor, color=EVALUATION, alpha=0.2, lw=0
    )
    axes.plot(grid, [max(v, floor) for v in values], color=EVALUATION, lw=1.3)
    axes.axvline(0, color=SOFT, lw=0.8, ls=(0, (2, 2)), zorder=1)
    axes.set_title("Density of all eigenvalues")
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("share of the eigenvalues per unit")
    if peak > 0:
        plain_log_scale(axes)
        axes.set_ylim(floor, peak * 3)


def _draw_course(axes: Axes, run: Run, largest: Sequence[tuple[float, float]]) -> None:
    curves = [
        (largest, EVALUATION, "o", "size of the dominant eigenvalue λ₁"),
        (_column(run, "last_layer_eigenvalue"), GREEN, "s", "of the last layer's block"),
        (_column(run, "kfac_eigenvalue"), SOFT, "v", "of the K-FAC factors"),
        (_column(run, "gradient_norm"), ACCENT, "^", "gradient norm"),
    ]
    drawn = False
    for points, colour, marker, label in curves:
        sizes = [(x, abs(y)) for x, y in points if y and math.isfinite(y)]
        if sizes:
            drawn = True
            axes.plot(
                *zip(*sizes, strict=True), color=colour, marker=marker, ms=3.2, lw=1.3, label=label
            )
    if drawn:
        plain_log_scale(axes)
        axes.legend(loc="best")
    axes.set_title("Curvature and gradient by epoch")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _column(run: Run, *names: str) -> list[tuple[float, float]]:
    points = []
    for row in run.metrics:
        value, epoch = first_number(row, *names), number(row, "epoch")
        if value is not None and epoch is not None:
            points.append((epoch, value))
    return points


def _caption(found: Found) -> str:
    text = (
        f"Step {found.get('step', 0):,} (epoch {found.get('epoch', 0):.4g}), "
        f"{found.get('samples', 0):,} samples of {found.get('split')}: "
        f"loss {_short(found.get('loss'))}, gradient norm {_short(found.get('gradient_norm'))}"
    )
    if whole := found.get("spectrum"):
        text += f", eigenvalues from {whole['smallest']:.3g} to {whole['largest']:.3g}"
    if trace := found.get("trace"):
        text += f", trace {_short(trace['mean'])}"
        if trace["standard_error"] is not None:
            text += f" ± {trace['standard_error']:.2g}"
    missing = "; ".join(found.get("notes", ()))
    return escaped(text + "." + (f" Missing: {missing}." if missing else ""))


def _bias_variance(found: Found) -> str:
    head = (
        '<th>split</th><th class="n">loss</th><th class="n">standard deviation of a sample</th>'
        f'<th class="n">samples</th><th class="n">loss + {found["factor"]:g}·√(Var/n)</th>'
    )
    rows = "".join(
        f'<tr><td>{escaped(name)}</td><td class="n">{_short(row["loss"])}</td>'
        f'<td class="n">{_short(math.sqrt(row["variance"]))}</td>'
        f'<td class="n">{row["samples"]:,}</td><td class="n">{_short(row["bound"])}</td></tr>'
        for name, row in found["splits"].items()
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _low_rank(found: Found) -> str:
    head = (
        '<th>matrix</th><th class="n">size</th><th class="n">rank</th><th class="n">of full</th>'
        '<th class="n">entries saved</th><th class="n">products that earn it back</th>'
    )
    rows = []
    for row in (found["kernel"], *found["matrices"]):
        back = row["products_to_amortise"]
        rows.append(
            f"<tr><td>{escaped(row['kind'])} {escaped(row['layer'])}</td>"
            f'<td class="n">{row["rows"]} × {row["columns"]}</td><td class="n">{row["rank"]}</td>'
            f'<td class="n">{row["share"]:.0%}</td><td class="n">{max(row["saving"], 0):.0%}</td>'
            f'<td class="n">{"never" if back is None else format(back, ",.0f")}</td></tr>'
        )
    agreed = sum(bool(value) for value in found["claims"].values())
    note = (
        f"Singular values above {found['epsilon']:g} of the largest, at step {found['step']:,}. "
        f"{agreed} of {len(found['claims'])} claims of the negative result hold here: kernel blocks "
        "compress, the network's matrices do not, and compression is not earned back in a step."
    )
    return f'<table><tr>{head}</tr>{"".join(rows)}</table><p class="note">{escaped(note)}</p>'


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"
