"""The outcome of a study: tables in the published form, judged claims, and files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from elastic_kfac.experiments.study import (
    COLUMNS,
    Assertion,
    Cell,
    Column,
    Place,
    Study,
    expand,
)
from elastic_kfac.experiments.study_statistics import (
    TEST,
    Bounds,
    Interval,
    Summary,
    Verdict,
    interval_of_mean,
    joint,
    paired_interval,
    summarise,
)
from elastic_kfac.experiments.trials import (
    DIVERGED,
    FAILED,
    FINISHED,
    WAITING,
    Trial,
    TrialTable,
)

_SOURCES = {"updates": "steps", "time_s": "train_time_s"}
"""Columns that have another name in `result.json`."""


def trial_of_cell(cell: Cell, result: Mapping[str, Any] | None) -> Trial:
    """A cell as a row of the trial table; `result` is its `result.json`, None while there is none."""
    trial = Trial(cell.name, str(cell.place), cell.seed, "study", status=WAITING)
    take_result(trial, result)
    return trial


def take_result(trial: Trial, result: Mapping[str, Any] | None) -> None:
    """Records the result of a cell; one that failed or diverged has a reason instead of values."""
    if result is None:
        return
    trial.status, trial.reason = str(result["status"]), str(result.get("error") or "")
    if trial.status == FINISHED:
        for name in COLUMNS:
            value = result.get(_SOURCES.get(name, name))
            if isinstance(value, int | float) and math.isfinite(value):
                trial.numbers[name] = float(value)


@dataclass(frozen=True)
class Comparison:
    """One comparison of a claim."""

    left: Place
    right: Place
    interval: Interval | None
    verdict: Verdict

    def label(self, ratio: bool) -> str:
        """`left − right` or `left / right`."""
        return f"{self.left} {'/' if ratio else '−'} {self.right}"


@dataclass(frozen=True)
class Claim:
    """A judged assertion."""

    assertion: Assertion
    comparisons: tuple[Comparison, ...]
    verdict: Verdict
    pooled: Interval | None = None
    """Interval of the mean over the comparisons, for assertions about that mean."""


class Outcome:
    """A study and its trials."""

    def __init__(self, name: str, study: Study, trials: TrialTable) -> None:
        self.name = name
        self.study = study
        self.trials = trials
        self.count = trials.count
        self._by_place: dict[str, list[Trial]] = {}
        for trial in trials.values():
            self._by_place.setdefault(trial.point, []).append(trial)

    def values(self, place: Place, column: str) -> dict[int, float]:
        """A column by seed, for the cells that have it."""
        trials = self._by_place.get(str(place), [])
        return {t.seed: t.numbers[column] for t in trials if column in t.numbers}

    def summary(self, place: Place, column: str) -> Summary | None:
        """Mean and spread over seeds."""
        return summarise(list(self.values(place, column).values()))

    def of(self, place: Place, status: str) -> int:
        """Cells of a place with that status."""
        return sum(trial.status == status for trial in self._by_place.get(str(place), []))

    def failures(self) -> list[Trial]:
        """Cells that ended without values."""
        return [trial for trial in self.trials.values() if trial.reason]

    def claims(self) -> list[Claim]:
        """Every assertion with its verdict."""
        return [self._judge(assertion) for assertion in self.study.assertions]

    def _judge(self, assertion: Assertion) -> Claim:
        bounds = Bounds(
            -math.inf if assertion.low is None else assertion.low,
            math.inf if assertion.high is None else assertion.high,
            assertion.above is None,
            assertion.below is None,
        )
        column, ratio = assertion.column, assertion.is_ratio
        pairs = [pair for text in assertion.compare for pair in expand(text, self.study)]
        comparisons = []
        for left, right in pairs:
            interval = paired_interval(
                self.values(left, column), self.values(right, column), ratio=ratio
            )
            comparisons.append(Comparison(left, right, interval, bounds.judge(interval)))
        if assertion.over == "each":
            verdict = joint([comparison.verdict for comparison in comparisons])
            return Claim(assertion, tuple(comparisons), verdict)
        pooled = self._pooled(pairs, column, ratio)
        return Claim(assertion, tuple(comparisons), bounds.judge(pooled), pooled)

    def _pooled(
        self, pairs: Sequence[tuple[Place, Place]], column: str, ratio: bool
    ) -> Interval | None:
        """Interval of the mean over comparisons, from the seeds that have all of them."""
        sides = [
            [self.values(place, column) for place in side] for side in zip(*pairs, strict=True)
        ]
        seeds = set.intersection(*(set(values) for side in sides for values in side))
        if ratio:
            if any(values[seed] <= 0 for side in sides for values in side for seed in seeds):
                return None
            left, right = (
                {s: math.exp(sum(math.log(v[s]) for v in side) / len(side)) for s in seeds}
                for side in sides
            )
            return paired_interval(left, right, ratio=True)
        left, right = ({s: sum(v[s] for v in side) / len(side) for s in seeds} for side in sides)
        return interval_of_mean([left[s] - right[s] for s in sorted(seeds)])


# ---- words and tables ------------------------------------------------------------------------


def number_text(column: Column, value: float) -> str:
    """A value as the tables show it: percent without a sign, counts whole, seconds plain."""
    if column.form == "percent":
        return f"{100 * value:.2f}"
    if column.form == "count":
        return f"{value:,.0f}" if abs(value - round(value)) < 0.05 else f"{value:,.1f}"
    if column.form == "seconds":
        return f"{value:.1f}"
    return f"{value:.2e}" if abs(value) >= 1e5 else f"{value:.{_decimals(value)}f}"


def summary_text(column: Column, summary: Summary | None) -> str:
    """`94.87 ± 0.12`; only the mean where all seeds agree, `–` without values."""
    if summary is None:
        return "–"
    if not summary.deviation:
        return number_text(column, summary.mean)
    if column.form == "number" and abs(summary.mean) < 1e5:
        # As many decimals of the spread as of the mean.
        decimals = _decimals(summary.mean)
        return f"{summary.mean:.{decimals}f} ± {summary.deviation:.{decimals}f}"
    return f"{number_text(column, summary.mean)} ± {number_text(column, summary.deviation)}"


def _decimals(value: float) -> int:
    """Decimals that show three digits of a value, and at most five."""
    if value == 0:
        return 3
    return min(5, max(0, 2 - math.floor(math.log10(abs(value)))))


def cell_text(outcome: Outcome, place: Place, columns: Sequence[Column]) -> str:
    """The entry of a table: summaries of some columns joined by ` / `, and counts of unfinished cells."""
    if not outcome.study.is_run(place):
        return "–"
    text = " / ".join(summary_text(c, outcome.summary(place, c.name)) for c in columns)
    if not any(outcome.values(place, column.name) for column in columns):
        text = ""
    notes = [
        f"{count} {status}"
        for status in (DIVERGED, FAILED, WAITING)
        if (count := outcome.of(place, status))
    ]
    return " ".join([*([text] if text else []), *([f"({', '.join(notes)})"] if notes else [])])


@dataclass(frozen=True)
class Table:
    """Batch sizes down, methods across."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(outcome: Outcome) -> list[Table]:
    """A table with accuracy and updates in one entry, as published, then one per other column."""
    wanted = [COLUMNS[name] for name in outcome.study.columns]
    names = [column.name for column in wanted]
    groups = [[column] for column in wanted]
    if {"accuracy", "updates"} <= set(names):
        together = [COLUMNS["accuracy"], COLUMNS["updates"]]
        groups = [together, *(g for g in groups if g[0] not in together)]
    return [_table(outcome, group) for group in groups]


def _table(outcome: Outcome, columns: Sequence[Column]) -> Table:
    study = outcome.study
    titles = [c.title + (", %" if c.form == "percent" else "") for c in columns]
    if columns[-1].form == "seconds":
        titles[-1] += ", s"
    rows = tuple(
        (
            f"{size:,}",
            *(cell_text(outcome, Place(method, size), columns) for method in study.methods),
        )
        for size in study.batch_sizes
    )
    return Table(" / ".join(titles), ("B", *study.methods), rows)


def table_text(table: Table) -> str:
    """A table for the terminal."""
    grid = [table.head, *table.rows]
    widths = [max(len(row[i]) for row in grid) for i in range(len(table.head))]
    lines = ["  ".join(text.rjust(w) for text, w in zip(row, widths, strict=True)) for row in grid]
    return "\n".join([table.title, *(f"  {line}" for line in lines)])


def bounds_text(assertion: Assertion) -> str:
    """`at least −1.00 points`, `above 0`."""
    words = {"above": "above", "at_least": "at least", "below": "below", "at_most": "at most"}
    parts = [
        f"{word} {_difference_text(assertion, bound)}"
        for name, word in words.items()
        if (bound := getattr(assertion, name)) is not None
    ]
    return " and ".join(parts)


def interval_text(assertion: Assertion, interval: Interval | None) -> str:
    """`+1.91 [+1.62, +2.20], n = 5`."""
    if interval is None:
        return "no value on both sides"
    mean = _difference_text(assertion, interval.mean)
    if interval.low is None or interval.high is None:
        return f"{mean}, one seed: no interval"
    low, high = (_difference_text(assertion, end) for end in (interval.low, interval.high))
    return f"{mean} [{low}, {high}], n = {interval.count}"


def _difference_text(assertion: Assertion, value: float) -> str:
    column = COLUMNS[assertion.column]
    if assertion.is_ratio:
        return f"{value:.3g}×"
    if value == 0:
        return "0"
    if column.form == "percent":
        return f"{100 * value:+.2f}"
    return f"{value:+,.0f}" if column.form == "count" else f"{value:+.3g}"


def claims_text(claims: Sequence[Claim]) -> str:
    """The claims for the terminal, verdicts first."""
    lines = []
    for number, claim in enumerate(claims, start=1):
        assertion = claim.assertion
        lines.append(f"  {claim.verdict.upper():<9}  ({number}) {assertion.says}")
        what = "in points" if COLUMNS[assertion.column].form == "percent" else ""
        if claim.pooled is not None:
            lines.append(
                f"             mean: {interval_text(assertion, claim.pooled)} {what}".rstrip()
            )
        for comparison in claim.comparisons:
            said = interval_text(assertion, comparison.interval)
            label = comparison.label(assertion.is_ratio)
            lines.append(f"             {label}: {said}, expected {bounds_text(assertion)}")
    return "\n".join([f"Claims ({TEST}):", *lines])


def outcome_text(outcome: Outcome) -> str:
    """A study on one or two screens of a terminal."""
    parts = [table_text(table) for table in tables(outcome)]
    if outcome.study.assertions:
        parts.append(claims_text(outcome.claims()))
    if failures := outcome.failures():
        lines = [f"  {t.point} seed {t.seed} {t.status}: {t.reason}" for t in failures[:10]]
        if len(failures) > 10:
            lines.append(f"  … and {len(failures) - 10} more")
        parts.append("\n".join(["Cells without values:", *lines]))
    return "\n\n".join(parts)


# ---- files -----------------------------------------------------------------------------------


def cells_csv(outcome: Outcome) -> str:
    """One line per cell."""
    return str(_cells(outcome).to_csv(index=False, float_format="%.10g"))


def summary_csv(outcome: Outcome) -> str:
    """One line per method and batch size: mean, standard deviation and count of every column."""
    cells, columns = _cells(outcome), outcome.study.wanted_columns()
    places = cells.groupby(["method", "batch_size"], sort=False)[columns]
    summary = places.agg(["mean", "std", "count"])
    summary.columns = [f"{c}_{'n' if what == 'count' else what}" for c, what in summary.columns]
    return str(summary.to_csv(float_format="%.10g"))


def _cells(outcome: Outcome) -> pd.DataFrame:
    columns = outcome.study.wanted_columns()
    rows = [
        (*t.point.rsplit("@", 1), t.seed, t.status, *(t.numbers.get(c, math.nan) for c in columns))
        for t in outcome.trials.values()
    ]
    return pd.DataFrame(rows, columns=["method", "batch_size", "seed", "status", *columns])


def to_json(outcome: Outcome) -> dict[str, Any]:
    """The content of `comparison.json`."""
    return {
        "study": outcome.name,
        "title": outcome.study.title,
        "test": TEST,
        "cells": {s: outcome.count(s) for s in (FINISHED, DIVERGED, FAILED, WAITING)},
        "tables": [asdict(table) for table in tables(outcome)],
        "claims": [
            {
                "says": claim.assertion.says,
                "verdict": claim.verdict,
                "column": claim.assertion.column,
                "bounds": bounds_text(claim.assertion),
                "pooled": None if claim.pooled is None else asdict(claim.pooled),
                "comparisons": [
                    {
                        "compare": comparison.label(claim.assertion.is_ratio),
                        "verdict": comparison.verdict,
                        "interval": (
                            None if comparison.interval is None else asdict(comparison.interval)
                        ),
                    }
                    for comparison in claim.comparisons
                ],
            }
            for claim in outcome.claims()
        ],
        "errors": {
            f"{trial.point} seed {trial.seed}": trial.reason for trial in outcome.failures()
        },
    }
