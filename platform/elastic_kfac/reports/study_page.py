"""The page of a study: claims, tables in the published form, and every column over batch sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from elastic_kfac import __version__
from elastic_kfac.experiments.study import COLUMNS, Assertion, Column, Place
from elastic_kfac.experiments.study_outcome import (
    DIVERGED,
    FAILED,
    FINISHED,
    Claim,
    Comparison,
    Outcome,
    Table,
    bounds_text,
    interval_text,
    tables,
)
from elastic_kfac.experiments.study_statistics import TEST, Verdict
from elastic_kfac.reports.figures import INK, SOFT, STYLE, plain_log_scale, svg_text
from elastic_kfac.reports.run_page import escaped, fold, mapping_table, page, section

COLOURS = ("#52606d", "#c4580f", "#5b8c5a", "#0b69a3", "#8d4a97", "#b7950b", "#1b998b", "#a61e4d")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LOG_FROM = 30.0
"""A column whose means span this factor gets a logarithmic axis."""
_BAD: Mapping[Verdict, str] = {"holds": "", "fails": " bad", "undecided": " bad"}


def render_comparison(outcome: Outcome, provenance: Mapping[str, Any]) -> str:
    """The page; equal outcomes give equal text."""
    study = outcome.study
    claims = outcome.claims()
    parts = [
        "<header>",
        f"<p>elastic-kfac study <b>{escaped(outcome.name)}</b> · {len(study.methods)} methods · "
        f"{len(study.batch_sizes)} batch sizes · {len(study.seeds)} seeds</p>",
        f"<h1>{escaped(headline(outcome, claims))}</h1>",
        "</header>",
    ]
    if study.about:
        parts.append(section("", f"<p>{escaped(study.about)}</p>"))
    if claims:
        parts.append(section("Claims", _claims(claims)))
    parts.append(section("By batch size", figure(outcome) + _figure_note(outcome)))
    parts += [section(table.title, _table(table)) for table in tables(outcome)]
    if wrong := _errors(outcome):
        parts.append(section("Cells without values", wrong))
    parts.append(fold("Methods", _methods(outcome)))
    parts.append(fold("Study", f"<pre>{escaped(_yaml(study.model_dump(mode='json')))}</pre>"))
    meanings = {COLUMNS[name].title: COLUMNS[name].help for name in study.wanted_columns()}
    parts.append(fold("What the columns mean", mapping_table(meanings)))
    note = f'<p class="note">Page written by elastic-kfac {__version__}.</p>'
    parts.append(section("Provenance", mapping_table(provenance) + note))
    return page(outcome.name, parts)


def headline(outcome: Outcome, claims: list[Claim]) -> str:
    """One sentence: what it is, how much of it is there, what became of the claims."""
    done, all_cells = outcome.count(FINISHED), len(outcome.cells)
    text = outcome.study.title or outcome.name
    cells = f"{all_cells} trainings" if done == all_cells else f"{done} of {all_cells} trainings"
    lost = [f"{n} {status}" for status in (DIVERGED, FAILED) if (n := outcome.count(status))]
    cells += f" ({', '.join(lost)})" if lost else ""
    if not claims:
        return f"{text}: {cells}."
    verdicts = [claim.verdict for claim in claims]
    held = verdicts.count("holds")
    more = [f"{n} {v}" for v in ("fails", "undecided") if (n := verdicts.count(v))]
    said = ", ".join([f"{held} of {len(claims)} claims hold", *more])
    return f"{text}: {cells}; {said}."


def figure(outcome: Outcome) -> str:
    """Every column over batch sizes: means with their standard deviations, one line per method."""
    columns = [COLUMNS[name] for name in outcome.study.columns]
    rows = -(-len(columns) // 2)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "comparison"}):
        drawn = Figure(figsize=(11, 3.1 * rows), layout="constrained")
        grid = drawn.subplots(rows, 2, squeeze=False).ravel()
        for axes, column in zip(grid, columns, strict=False):
            _draw(axes, outcome, column)
        for axes in grid[len(columns) :]:
            axes.set_axis_off()
        handles, labels = grid[0].get_legend_handles_labels()
        if handles:
            drawn.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 8))
        return svg_text(drawn)


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


def _figure_note(outcome: Outcome) -> str:
    return (
        f'<p class="note">Means over up to {len(outcome.study.seeds)} seeds; '
        "bars: one standard deviation.</p>"
    )


def _claims(claims: list[Claim]) -> str:
    rows = []
    for number, claim in enumerate(claims, start=1):
        assertion = claim.assertion
        column = COLUMNS[assertion.column]
        unit = " (points)" if column.form == "percent" and not assertion.is_ratio else ""
        details = "".join(_comparison(assertion, c) for c in claim.comparisons)
        if claim.pooled is not None:
            pooled = escaped(interval_text(assertion, claim.pooled))
            details = f"<div><b>mean over all: {pooled}</b></div>{details}"
        rows.append(
            f'<tr><td><span class="kind{_BAD[claim.verdict]}">{claim.verdict}</span></td>'
            f"<td>({number}) {escaped(assertion.says)}"
            f'<div class="note">{escaped(column.title)}{unit}, '
            f"wanted {escaped(bounds_text(assertion))}</div></td><td>{details}</td></tr>"
        )
    note = (
        f'<p class="note">{TEST}: cells of one seed share weights and sample order, and '
        "mean(d) ± t·sd(d)/√n is the interval of their differences d (of logarithms for ratios). "
        "A claim holds when the interval lies within its bounds, fails when it lies outside, and "
        "is undecided otherwise; of several comparisons all have to hold.</p>"
    )
    head = "<tr><th>verdict</th><th>claim</th><th>difference and interval</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>{note}"


def _comparison(assertion: Assertion, comparison: Comparison) -> str:
    said = escaped(interval_text(assertion, comparison.interval))
    label = escaped(comparison.label(assertion.is_ratio))
    verdict = "" if comparison.verdict == "holds" else f" · {comparison.verdict}"
    return f"<div>{label}: {said}{verdict}</div>"


def _table(table: Table) -> str:
    head = "".join(f'<th class="n">{escaped(name)}</th>' for name in table.head)
    rows = "".join(
        "<tr>" + "".join(f'<td class="n">{escaped(text)}</td>' for text in row) + "</tr>"
        for row in table.rows
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _errors(outcome: Outcome) -> str:
    rows = "".join(
        f"<tr><td>{escaped(cell.place)}</td><td>{cell.seed}</td>"
        f"<td>{escaped(cell.status)}</td><td>{escaped(cell.error)}</td></tr>"
        for cell in outcome.cells
        if cell.error
    )
    head = "<tr><th>cell</th><th>seed</th><th>status</th><th>cause</th></tr>"
    return f"<table>{head}{rows}</table>" if rows else ""


def _methods(outcome: Outcome) -> str:
    rows = "".join(
        f"<tr><td><b>{escaped(name)}</b></td><td>{escaped(method.title)}</td>"
        f"<td><code>{escaped(_changes(method.set))}</code></td></tr>"
        for name, method in outcome.study.methods.items()
    )
    head = "<tr><th>method</th><th>what it is</th><th>changes of the base</th></tr>"
    return f"<table>{head}{rows}</table>"


def _changes(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in changes.items()) or "none"


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, default_flow_style=None, width=96).rstrip()
