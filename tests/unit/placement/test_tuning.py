"""Intervals and damping that follow from what steps cost."""

from __future__ import annotations

import random

import pytest

from elastic_kfac.placement.choice import HYSTERESIS
from elastic_kfac.placement.tuning import (
    MOST,
    SHARE,
    StepCost,
    choose_intervals,
    fit_step_cost,
    tuned_damping,
)


def test_costs_are_recovered_from_steps_that_spread_their_work_despite_a_stall() -> None:
    truth = StepCost(0.010, 0.004, 0.030)
    rng = random.Random(1)
    seconds: dict[tuple[float, float], list[float]] = {}
    for step in range(400):
        taken, done = (0.5 if step % 5 in (0, 3) else 0.0), (0.25 if step % 10 == 7 else 0.0)
        done = 1.0 if step == 0 else done
        value = truth.plain + taken * truth.statistics + done * truth.decompositions
        value *= rng.uniform(0.95, 1.05)
        seconds.setdefault((taken, done), []).append(value if step % 50 else value + 1.0)
    found = fit_step_cost({key: values for key, values in seconds.items() if len(values) > 1})
    assert found is not None
    assert found.plain == pytest.approx(truth.plain, rel=0.05)
    assert found.statistics == pytest.approx(truth.statistics, rel=0.25)
    assert found.decompositions == pytest.approx(truth.decompositions, rel=0.25)


def test_work_that_every_step_has_counts_as_the_step_itself() -> None:
    found = fit_step_cost({(1.0, 0.0): [0.3, 0.3], (1.0, 1.0): [0.5]})
    assert found is not None
    assert (found.plain, found.statistics) == (pytest.approx(0.3), 0.0)
    assert found.decompositions == pytest.approx(0.2)
    assert fit_step_cost({}) is None


def test_shortest_intervals_of_a_tenth_of_a_step() -> None:
    rng = random.Random(2)
    changed = 0
    for _ in range(200):
        cost = StepCost(rng.uniform(1e-3, 1), rng.uniform(0, 1), rng.uniform(0, 10))
        given = (rng.choice([1, 2, 5]), 10 * rng.randint(1, 5))
        best = choose_intervals(cost, given, given)
        tried = [(f, max(1, round(given[1] * f / given[0]))) for f in range(1, MOST * given[0] + 1)]
        allowed = [i for i in tried if cost.refresh(i) <= SHARE * cost.step(i)] or tried[-1:]
        kept = (
            0.5 < allowed[0][1] / given[1] < 2
            and abs(cost.step(allowed[0]) / cost.step(given) - 1) < HYSTERESIS
        )
        assert best == (given if kept else allowed[0])
        assert best[1] * given[0] == given[1] * best[0]
        changed += best != given
    assert 50 < changed < 200


def test_damping_grows_with_age_and_falls_with_the_batch() -> None:
    assert tuned_damping(0.01, 4.0, 1.0) == pytest.approx(0.02)
    assert tuned_damping(0.01, 1.0, 4.0) == pytest.approx(0.005)
    assert tuned_damping(0.01, 2.0, 2.0) == 0.01
