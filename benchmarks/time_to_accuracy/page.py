"""The report: profiles, scores, and a table per quantity, as one page of the reports' kit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from protocol import TAU, share_within

from elastic_kfac.reports.figures import HALF, drawn
from elastic_kfac.reports.pages import Table, page, part, plain
from elastic_kfac.reports.study_page import COLOURS

QUANTITIES = {"steps": "steps", "cpu_s": "CPU seconds"}


def write_report(target: Path, content: dict[str, Any]) -> None:
    """Writes nothing before a workload is complete."""
    summary = content["summary"]
    if not summary:
        return
    methods = list(summary["steps"]["profile_score"])
    score = summary["steps"]["profile_score"], summary["cpu_s"]["profile_score"]
    best = [max(each, key=each.__getitem__) for each in score]
    tables = [
        (
            Table.of(
                "Performance-profile scores",
                "method|#by steps|#by CPU seconds",
                [(m, *(f"{each[m]:.3f}" for each in score)) for m in methods],
                compact=True,
            ),
            f"Share of workloads within τ of the fastest method, averaged over 1 ≤ τ ≤ {TAU:g}.",
        )
    ]
    claims = [
        ("holds" if each["holds"] else "fails", name, plain(each["value"]))
        for name, each in summary["claims"].items()
    ]
    tables.append((Table.of("Goals", "verdict|goal|found", claims), ""))
    for key, name in QUANTITIES.items():
        medians, ranges = summary[key]["median_to_target"], summary[key]["range_to_target"]
        rows = [
            (w, f"{content['targets'][w]:.4g}", *(_cell(row[m], ranges[w][m]) for m in methods))
            for w, row in medians.items()
        ]
        head = "workload|#target|" + "|".join(f"#{m}" for m in methods)
        note = "Median over studies of the fastest point (lowest to highest); – is a miss."
        tables.append((Table.of(f"{name} to the target", head, rows), note))
    for key, name in {
        "cpu_ms_per_step": "CPU milliseconds per step",
        "points_that_reached": "Runs that reached the target",
    }.items():
        rows = [
            (w, *("–" if row[m] is None else row[m] for m in methods))
            for w, row in summary[key].items()
        ]
        tables.append((Table.of(name, "workload|" + "|".join(f"#{m}" for m in methods), rows), ""))
    spaces = [
        (m, ", ".join(f"{k} {low:g}–{high:g}" for k, (low, high) in space.items()) or "none")
        for m, space in content["spaces"].items()
    ]
    tables.append((Table.of("Spaces, log-uniform", "method|settings", spaces), ""))
    facts = [(k, plain(content[k])) for k in ("settings", "hardware", "versions", "peers")]
    tables.append((Table.of("Provenance", "what|value", facts), ""))
    count = len(summary["steps"]["median_to_target"])
    figure = drawn("profiles", lambda figure: _profiles(figure, summary), (2 * HALF[0], HALF[1]))
    text = page(
        "base.html",
        title="Time to accuracy",
        headline=f"Best by steps: {best[0]}; by CPU time: {best[1]}; "
        f"{count} workload{'s' * (count != 1)}.",
        body=Markup('<section><figure class="wide">{}</figure></section>').format(figure)
        + part("analysis.html", panels=[], notes=[], tables=tables),
    )
    target.write_text(text, encoding="utf-8")


def _cell(median: float | None, ends: list[float | None]) -> str:
    middle, low, high = ("–" if v is None else f"{v:g}" for v in (median, *ends))
    return middle if low == high else f"{middle} ({low} to {high})"


def _profiles(figure: Figure, summary: dict[str, Any]) -> None:
    taus = np.linspace(1, TAU, 301)
    for axes, (key, name) in zip(
        figure.subplots(1, 2, sharey=True), QUANTITIES.items(), strict=True
    ):
        for colour, (method, found) in zip(COLOURS, summary[key]["ratios"].items(), strict=False):
            ratios = [np.inf if r is None else r for r in found]
            shares = [share_within(ratios, tau) for tau in taus]
            axes.step(taus, shares, where="post", label=method, color=colour, lw=1.5)
        axes.set_title(f"Within τ of the fastest, {name}")
        axes.set_xlabel("τ")
        axes.set_ylim(-0.02, 1.02)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
