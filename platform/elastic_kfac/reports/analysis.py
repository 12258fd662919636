"""Figures and tables of `analyze`, of the probes, and of analyses during training.

The largest eigenvalues of the whole set and of one sample, the loss along the dominant eigenvector on
both splits, the spectral density, and the dominant eigenvalue and the gradient norm over epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from elastic_kfac.reports.figures import (
    ACCENT,
    EVALUATION,
    GREEN,
    INK,
    SOFT,
    drawn,
    plain_log_scale,
    plot_points,
)
from elastic_kfac.reports.pages import Table, part
from elastic_kfac.runs.history import Run, first_number, number

Found = Mapping[str, Any]
_SHOWN_RANGE = 1e6
"""Decades below the largest eigenvalue that are rounding, not curvature."""


def figures(found: Found) -> dict[str, Markup]:
    """Figures of one analysis by name; a probe has none."""
    if found.get("kind") != "curvature":
        return {}
    parts: dict[str, Callable[[Axes, Found], None]] = {}
    if len(found.get("spectrum", {}).get("eigenvalues", ())) > 1:
        parts["spectrum"] = _draw_spectrum
    if found.get("landscape"):
        parts["landscape"] = _draw_landscape
    if found.get("density"):
        parts["density"] = _draw_density
    return {name: _figure(name, draw, found) for name, draw in parts.items()}


def training_figure(run: Run) -> Markup | None:
    """λ_1 and the gradient norm over epochs; None when they were not measured during training."""
    if not _column(run, "top_eigenvalue", "hessian_eigenvalue"):
        return None
    return _figure("course", _draw_training, run)


def analysis_section(run: Run) -> Markup:
    """The part of a run's page about its loss surface; empty when nothing was analysed."""
    newest = _newest_of_each(run.analyses)
    during_training = training_figure(run)
    panels = [] if during_training is None else [("Curvature and gradient", during_training)]
    notes, tables = [], []
    for found in newest:
        kind = found.get("kind")
        if kind == "curvature":
            panels += figures(found).items()
            notes.append(_caption(found))
        elif kind == "bias_variance":
            tables.append((_bias_variance(found), ""))
        elif kind == "low_rank":
            tables.append(_low_rank(found))
    tables.sort(key=lambda pair: pair[0].caption)
    return part("analysis.html", panels=panels, notes=notes, tables=tables)


def _figure(name: str, draw: Callable[[Axes, Any], None], what: Any) -> Markup:
    return drawn(f"analysis-{name}", lambda figure: draw(figure.subplots(), what))


def _newest_of_each(analyses: Sequence[Found]) -> list[Found]:
    """The newest result of every kind and split: a page is about the end of a run."""
    newest: dict[tuple[object, object], Found] = {}
    for found in analyses:
        key = (found.get("kind"), found.get("split"))
        if key not in newest or found.get("step", 0) >= newest[key].get("step", 0):
            newest[key] = found
    return list(newest.values())


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
    for block, colour, label in series:
        values = block["eigenvalues"]
        ranks = range(1, len(values) + 1)
        axes.plot(ranks, [abs(v) for v in values], color=colour, lw=1.4, label=label)
        for sign, face in ((1, colour), (-1, "white")):
            points = [(r, abs(v)) for r, v in zip(ranks, values, strict=True) if v * sign > 0]
            plot_points(axes, points, "o", ms=4, mfc=face, mec=colour, zorder=3)
    axes.set_title("Largest eigenvalues of the Hessian")
    axes.set_xlabel("rank by magnitude (open circle: negative)")
    axes.set_ylabel("magnitude")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    if biggest > 0:
        plain_log_scale(axes)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], biggest / _SHOWN_RANGE))
    axes.legend(loc="best")


def _draw_landscape(axes: Axes, found: Found) -> None:
    seen = found["landscape"]
    distances = seen["distances"]
    colours = dict(zip(seen["losses"], (EVALUATION, ACCENT, GREEN), strict=False))
    for name, losses in seen["losses"].items():
        points = [(d, v) for d, v in zip(distances, losses, strict=True) if v is not None]
        plot_points(axes, points, color=colours[name], lw=1.6, label=name)
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


def _draw_training(axes: Axes, run: Run) -> None:
    curves = (
        (
            "o",
            EVALUATION,
            "dominant eigenvalue λ₁, magnitude",
            "top_eigenvalue",
            "hessian_eigenvalue",
        ),
        ("s", GREEN, "last layer's block", "last_layer_eigenvalue"),
        ("v", SOFT, "K-FAC factors", "kfac_eigenvalue"),
        ("^", ACCENT, "gradient norm", "gradient_norm"),
    )
    for marker, colour, label, *names in curves:
        points = [(x, abs(y)) for x, y in _column(run, *names) if y and math.isfinite(y)]
        plot_points(axes, points, f"-{marker}", color=colour, ms=3.2, lw=1.3, label=label)
    if axes.lines:
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
    return text + "." + (f" Missing: {missing}." if missing else "")


def _bias_variance(found: Found) -> Table:
    head = "split|#loss|#standard deviation of a sample|#samples|"
    rows = [
        [
            name,
            _short(row["loss"]),
            _short(math.sqrt(row["variance"])),
            f"{row['samples']:,}",
            _short(row["bound"]),
        ]
        for name, row in found["splits"].items()
    ]
    bound = f"#loss + {found['factor']:g}·√(Var/n)"
    return Table.of("Bias and variance", head + bound, rows)


def _low_rank(found: Found) -> tuple[Table, str]:
    head = "matrix|#size|#rank|#of full|#entries saved|#products that amortise it"
    rows = []
    for row in (found["kernel"], *found["matrices"]):
        back = row["products_to_amortise"]
        rows.append(
            [
                f"{row['kind']} {row['layer']}",
                f"{row['rows']} × {row['columns']}",
                row["rank"],
                f"{row['share']:.0%}",
                f"{max(row['saving'], 0):.0%}",
                "never" if back is None else format(back, ",.0f"),
            ]
        )
    agreed = sum(bool(value) for value in found["claims"].values())
    note = (
        f"Singular values above {found['epsilon']:g} of the largest, at step {found['step']:,}. "
        f"{agreed} of {len(found['claims'])} claims of the negative result hold here: kernel blocks "
        "compress, the network's matrices do not, and one step does not amortise the compression."
    )
    return Table.of("Low-rank probe", head, rows), note


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"
