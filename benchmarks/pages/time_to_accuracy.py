"""docs/time_to_accuracy.md: K-FAC against other tuned methods."""

from __future__ import annotations

from collections.abc import Iterator

from pages.values import Page, Row, load, n

DOCUMENT = "docs/time_to_accuracy.md"
_COSTS = {"steps": ("steps", ",.0f"), "CPU s": ("cpu_s", ".1f")}


def rows() -> Iterator[Row]:
    """Scores by method, then what each method took on each workload."""
    summary = load("time_to_accuracy")["summary"]
    for method in summary["steps"]["profile_score"]:
        scores = (summary[key]["profile_score"][method] for key, _ in _COSTS.values())
        yield Row(DOCUMENT, method, tuple(n(score, ".2f") for score in scores))
    for workload in summary["steps"]["median_to_target"]:
        for unit, (key, form) in _COSTS.items():
            found = summary[key]["median_to_target"][workload]
            cells = ("–" if value is None else n(value, form) for value in found.values())
            yield Row(DOCUMENT, f"{workload}, {unit}", tuple(cells))


PAGE = Page(DOCUMENT, rows, given={"40 % less CPU time": "goal"})
