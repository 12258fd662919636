"""How trials compare: those that reach the target by what it took, the others behind them.

A trial that misses the target is censored: it would have taken longer than it was given, but nobody
knows by how much. It is never given a made-up time; it ranks behind every trial that arrived, by the
accuracy that it lacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_kfac.experiments.search_space import METRICS, Objective


@dataclass(frozen=True)
class Outcome:
    """What one trial came to."""

    value: float | None
    """The metric at the moment the target was reached; None for a censored trial."""
    best_accuracy: float | None
    """None if it was never evaluated."""

    @property
    def reached(self) -> bool:
        return self.value is not None


def score(outcome: Outcome, objective: Objective) -> float:
    """A number for searchers, smaller is better: below 1 who arrived, from 1 to 2 who did not.

    v / (1 + v) keeps the order of values v >= 0; the censored get 1 plus the share of the target that
    they lack (`by_distance`) or 2 (`equal`).
    """
    if outcome.value is not None:
        value = max(outcome.value, 0.0)
        return value / (1.0 + value) if math.isfinite(value) else 1.0
    if objective.censored == "equal" or outcome.best_accuracy is None:
        return 2.0
    lacking = (objective.target_accuracy - outcome.best_accuracy) / objective.target_accuracy
    return 1.0 + min(max(lacking, 0.0), 1.0)


def median_index(outcomes: Sequence[Outcome], objective: Objective) -> int:
    """Which repeat stands for a point: the median; of an even number the worse one in the middle."""
    order = sorted(range(len(outcomes)), key=lambda index: score(outcomes[index], objective))
    return order[len(order) // 2]


def objective_value(objective: Objective, result: Mapping[str, Any]) -> float | None:
    """The metric of a run that stopped at its target, from `result.json`; None if it did not.

    `cpu_seconds` and `emulated_step_s` are looked for in the same mapping.
    """
    if result.get("train_time_to_accuracy_s") is None:
        return None
    metric = objective.metric
    if metric == "emulated_time_to_accuracy_s":
        step = result.get("emulated_step_s")
        return None if step is None else float(result["steps"]) * float(step)
    key = {
        "steps_to_accuracy": "steps",
        "worker_seconds_to_accuracy": "worker_seconds",
        "cpu_seconds_to_accuracy": "cpu_seconds",
    }.get(metric, metric)
    value = result.get(key)
    return None if value is None else float(value)


def censoring_rule(objective: Objective) -> str:
    """The rule in one sentence, for reports."""
    unit = METRICS[objective.metric]
    how = (
        "by how far their best accuracy is below it"
        if objective.censored == "by_distance"
        else "all alike"
    )
    return (
        f"Trials that reach {objective.target_accuracy:.4g} rank by {unit}; those that do not "
        f"(budget used up, stopped early or failed) rank behind all of them, {how}, and are never "
        "given a time."
    )
