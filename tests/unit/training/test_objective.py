"""Objective: order, censoring and the median, against the rule written out."""

from __future__ import annotations

import itertools
import math

import pytest

from elastic_kfac.experiments.objective import (
    Outcome,
    censoring_rule,
    median_index,
    objective_value,
    score,
)
from elastic_kfac.experiments.search_space import METRICS, Objective

TARGET = Objective(target_accuracy=0.9)


def rank(outcome: Outcome) -> tuple[int, float]:
    """The rule as a sort key: arrived by value, then the rest by what they lack."""
    if outcome.value is not None:
        return (0, outcome.value)
    return (1, math.inf if outcome.best_accuracy is None else 0.9 - outcome.best_accuracy)


def test_score_orders_as_the_rule_says() -> None:
    outcomes = [
        Outcome(0.0, 0.95),
        Outcome(3.0, 0.91),
        Outcome(3.1, 0.99),
        Outcome(1e6, 0.9),
        Outcome(None, 0.89),
        Outcome(None, 0.5),
        Outcome(None, 0.0),
        Outcome(None, None),
    ]
    for first, second in itertools.combinations(outcomes, 2):
        assert rank(first) < rank(second)
        assert score(first, TARGET) <= score(second, TARGET)
    arrived = [score(outcome, TARGET) for outcome in outcomes[:4]]
    assert arrived == sorted(set(arrived))
    assert max(arrived) < 1 < score(outcomes[4], TARGET) < score(outcomes[5], TARGET)


def test_score_equal_rule_makes_no_difference_between_those_who_missed() -> None:
    equal = Objective(target_accuracy=0.9, censored="equal")
    assert score(Outcome(None, 0.89), equal) == score(Outcome(None, 0.1), equal) == 2.0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0, 1.0, 3.0], 3.0),
        ([5.0, 1.0], 5.0),  # the worse one in the middle
        ([4.0], 4.0),
        ([None, 1.0, 2.0], 2.0),
        ([None, None, 2.0], None),
    ],
)
def test_median_is_a_run_that_exists(values: list[float | None], expected: float | None) -> None:
    outcomes = [Outcome(value, 0.5) for value in values]
    assert outcomes[median_index(outcomes, TARGET)].value == expected


def test_objective_value_reads_each_metric_and_only_of_runs_that_arrived() -> None:
    result = {
        "train_time_to_accuracy_s": 7.0,
        "time_to_accuracy_s": 9.0,
        "steps": 40,
        "worker_seconds": 14.0,
        "cpu_seconds": 6.0,
        "emulated_step_s": 0.5,
    }
    found = {
        metric: objective_value(Objective(metric=metric, target_accuracy=0.9), result)  # type: ignore[arg-type]
        for metric in METRICS
    }
    assert found == {
        "train_time_to_accuracy_s": 7.0,
        "time_to_accuracy_s": 9.0,
        "steps_to_accuracy": 40.0,
        "worker_seconds_to_accuracy": 14.0,
        "cpu_seconds_to_accuracy": 6.0,
        "emulated_time_to_accuracy_s": 20.0,
    }
    missed = {**result, "train_time_to_accuracy_s": None}
    assert objective_value(TARGET, missed) is None


def test_rule_is_said_in_a_sentence() -> None:
    assert "rank behind all of them" in censoring_rule(TARGET)
