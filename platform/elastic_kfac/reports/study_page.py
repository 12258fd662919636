"""The page of a study: claims, tables in the published form, and every column over batch sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from elastic_kfac.experiments.study import COLUMNS, Column, Place
from elastic_kfac.experiments.study_outcome import (
    Claim,
    Outcome,
    bounds_text,
    interval_text,
    tables,
)
from elastic_kfac.experiments.study_statistics import TEST
from elastic_kfac.experiments.trials import DIVERGED, FAILED, FINISHED
from elastic_kfac.reports.figures import INK, SOFT, drawn, plain_log_scale
from elastic_kfac.reports.pages import Table, code, page, yaml_text

COLOURS = ("#52606d", "#c4580f", "#5b8c5a", "#0b69a3", "#8d4a97", "#b7950b", "#1b998b", "#a61e4d")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LOG_FROM = 30.0
"""A column whose means span this factor gets a logarithmic axis."""


def render_study(outcome: Outcome, provenance: Mapping[str, Any]) -> str:
    """The page of a study; equal outcomes give equal text."""
    study, claims = outcome.study, outcome.claims()
    changes = {
        name: ", ".join(f"{key}={value}" for key, value in method.set.items()) or "none"
        for name, method in study.methods.items()
    }
    return page(
        "study.html",
        title=outcome.name,
        headline=headline(outcome, claims),
        study=study,
        claims=[_claim(claim) for claim in claims],
        test=TEST,
        figure=_figure(outcome),
        figure_note=f"Means over up to {len(study.seeds)} seeds; bars: one standard deviation.",
        tables=[
            Table.of(t.title, "|".join(f"#{name}" for name in t.head), t.rows, compact=True)
            for t in tables(outcome)
        ],
        failures=Table.of(
            "Cells without values",
            "cell|#seed|status|cause",
            [(t.point, t.seed, t.status, t.reason) for t in outcome.failures()],
        ),
        methods=Table.of(
            "Methods",
            "method|title|changes to the base",
            [(name, m.title, code(changes[name])) for name, m in study.methods.items()],
        ),
        yaml=yaml_text(study.model_dump(mode="json")),
        meanings={COLUMNS[name].title: COLUMNS[name].help for name in study.wanted_columns()},
        provenance=provenance,
    )


def headline(outcome: Outcome, claims: Sequence[Claim]) -> str:
    """One sentence: the title, how many cells are finished, how many claims hold."""
    done, total = outcome.count(FINISHED), len(outcome.trials)
    text = outcome.study.title or outcome.name
    cells = f"{total} trainings" if done == total else f"{done} of {total} trainings"
    lost = [f"{n} {status}" for status in (DIVERGED, FAILED) if (n := outcome.count(status))]
    cells += f" ({', '.join(lost)})" if lost else ""
    if not claims:
        return f"{text}: {cells}."
    verdicts = [claim.verdict for claim in claims]
    more = [f"{n} {v}" for v in ("fails", "undecided") if (n := verdicts.count(v))]
    counts = ", ".join([f"{verdicts.count('holds')} of {len(claims)} claims hold", *more])
    return f"{text}: {cells}; {counts}."


def _claim(claim: Claim) -> dict[str, Any]:
    assertion = claim.assertion
    column = COLUMNS[assertion.column]
    is_points = column.form == "percent" and not assertion.is_ratio
    comparisons = [
        f"{each.label(assertion.is_ratio)}: {interval_text(assertion, each.interval)}"
        + ("" if each.verdict == "holds" else f" · {each.verdict}")
        for each in claim.comparisons
    ]
    return {
        "verdict": claim.verdict,
        "says": assertion.says,
        "column": column.title + (" (points)" if is_points else ""),
        "bounds": bounds_text(assertion),
        "pooled": "" if claim.pooled is None else interval_text(assertion, claim.pooled),
        "comparisons": comparisons,
    }


def _figure(outcome: Outcome) -> Markup:
    """Every column over batch sizes: means with standard deviations, one line per method."""
    columns = [COLUMNS[name] for name in outcome.study.columns]
    rows = -(-len(columns) // 2)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, 2, squeeze=False).ravel()
        for axes, column in zip(grid, columns, strict=False):
            _draw(axes, outcome, column)
        for axes in grid[len(columns) :]:
            axes.set_axis_off()
        handles, labels = grid[0].get_legend_handles_labels()
        if handles:
            ncols = min(len(labels), 8)
            figure.legend(handles, labels, loc="outside upper center", ncols=ncols)

    return drawn("comparison", draw, (11, 3.1 * rows))


def _draw(axes: Axes, outcome: Outcome, column: Column) -> None:
    study, means = outcome.study, []
    for index, method in enumerate(study.methods):
        places = [Place(method, size) for size in study.batch_sizes]
        found = [(p.batch_size, s) for p in places if (s := outcome.summary(p, column.name))]
        if not found:
            continue
        means += [summary.mean for _, summary in found]
        axes.errorbar(
            [size for size, _ in found],
            [summary.mean for _, summary in found],
            yerr=[summary.deviation or 0.0 for _, summary in found],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKS[index % len(MARKS)],
            ms=4.5,
            lw=1.5,
            elinewidth=0.9,
            capsize=2.5,
            label=method,
        )
    axes.set_title(column.title + (", seconds" if column.form == "seconds" else ""))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(study.batch_sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("batch size")
    if column.form == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    elif means and min(means) > 0 and max(means) / min(means) >= _LOG_FROM:
        plain_log_scale(axes)
    if not means:
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", color=SOFT)
    axes.tick_params(labelcolor=INK)
