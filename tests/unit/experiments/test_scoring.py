"""Objective: order, censoring and the median, against the rule written out."""

from __future__ import annotations

import itertools
import math

import pytest

from elastic_kfac.experiments.search_space import METRICS, Objective
from elastic_kfac.experiments.trials import Scoring, Trial

TARGET = Scoring(0.9)


def outcome(value: float | None, best_value: float | None) -> Trial:
    numbers = {"objective": value, "best_value": best_value}
    trial = Trial("t", "0", 0, reached=value is not None)
    trial.note(numbers, *numbers)
    return trial


def rank(trial: Trial) -> tuple[int, float]:
    """The rule as a sort key: arrived by value, then the rest by what they lack."""
    if trial.value is not None:
        return (0, trial.value)
    accuracy = trial.numbers.get("best_value")
    return (1, math.inf if accuracy is None else 0.9 - accuracy)


def test_score_orders_as_the_rule_says() -> None:
    outcomes = [
        outcome(0.0, 0.95),
        outcome(3.0, 0.91),
        outcome(3.1, 0.99),
        outcome(1e6, 0.9),
        outcome(None, 0.89),
        outcome(None, 0.5),
        outcome(None, 0.0),
        outcome(None, None),
    ]
    for first, second in itertools.combinations(outcomes, 2):
        assert rank(first) < rank(second)
        assert TARGET.score(first) <= TARGET.score(second)
    arrived = [TARGET.score(trial) for trial in outcomes[:4]]
    assert arrived == sorted(set(arrived))
    assert max(arrived) < 1 < TARGET.score(outcomes[4]) < TARGET.score(outcomes[5])


def test_score_equal_rule_makes_no_difference_between_those_who_missed() -> None:
    equal = Objective(target_accuracy=0.9, censored="equal").scoring
    assert equal.score(outcome(None, 0.89)) == equal.score(outcome(None, 0.1)) == 2.0


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
    outcomes = [outcome(value, 0.5) for value in values]
    assert TARGET.median(outcomes).value == expected


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
        metric: Objective(metric=metric, target_accuracy=0.9).value_of(result)  # type: ignore[arg-type]
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
    assert Objective(target_accuracy=0.9).value_of(missed) is None


def test_rule_is_said_in_a_sentence() -> None:
    assert "rank behind all of them" in Objective(target_accuracy=0.9).censoring_rule


def test_metric_that_should_fall_ranks_by_what_is_above_the_target() -> None:
    scoring = Scoring(2.0, direction="min")
    near, far = outcome(None, 2.5), outcome(None, 3.0)
    assert scoring.rank(near) == (1, 0.25) and scoring.rank(far) == (1, 0.5)
    assert scoring.rank(outcome(7.0, 1.9)) < scoring.rank(near) < scoring.rank(far)
