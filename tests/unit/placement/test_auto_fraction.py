"""`grad_worker_frac: auto`: the least predicted time, the budget, and what keeps a plan."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from elastic_kfac.errors import ConfigError
from elastic_kfac.placement.choice import HYSTERESIS, AutoFraction, auto_fraction, kfac_workload
from elastic_kfac.placement.costs import CostModel, LayerShape
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.planner import make_plan, max_second_order_elements
from elastic_kfac.placement.simulator import Calibration, Line, Workload, predict_step
from elastic_kfac.placement.traffic import memory_elements

Layers = tuple[LayerShape, ...]
TRAFFIC = Calibration(CostModel(0.0, 1e-30, 3.0), 0.0, Line(0.0, 1.0))
"""Free arithmetic and no latency: time is traffic."""


def _fraction(
    layers: Layers,
    world_size: int,
    steps: int,
    precompute: bool = True,
    budget: float | None = None,
) -> float:
    workload = kfac_workload(layers, inverse_update_steps=steps, precompute=precompute)
    return auto_fraction(workload, TRAFFIC, world_size, memory_budget_bytes=budget).fraction


def _random_layers(rng: random.Random, count: int, widest: int = 40) -> Layers:
    layers = []
    for index in range(count):
        a, g = rng.randint(2, widest), rng.randint(2, widest)
        layers.append(LayerShape(f"x{index}", a, g, a * g))
    return tuple(layers)


def test_by_traffic_alone_the_optimum_is_the_published_end_point(resnet50: Layers) -> None:
    one = (LayerShape("x", 10, 10, 100),)  # e = 300 with precomputation, w = 100
    assert _fraction(one, 8, 4) == 1.0
    assert _fraction(one, 8, 2) == 1 / 8
    assert _fraction(one, 8, 3, precompute=False) == 1.0  # e = 220 without
    assert _fraction(resnet50, 64, 7) == 1 / 64
    assert _fraction(resnet50, 64, 8) == 1.0
    budget = 900 * 2**20
    chosen = _fraction(resnet50, 64, 8, budget=budget)
    assert 1 / 64 < chosen < 1.0
    assert 4 * max(memory_elements(make_plan(resnet50, 64, chosen), resnet50)) <= budget


def test_the_largest_fraction_that_fits_the_budget() -> None:
    layers = _random_layers(random.Random(4), 12)
    for budget in (1.1e5, 1.2e5, 1.4e5, 2e5, 1e7):
        fitting = []
        for columns in range(1, 9):
            plan = make_plan(layers, 8, 1 / columns, costs=TRAFFIC.costs)
            s = sum(x.a_dim**2 + x.g_dim**2 for x in layers)
            if 4 * (s + max_second_order_elements(plan, layers)) <= budget:
                fitting.append(1 / columns)
        if fitting:
            assert _fraction(layers, 8, 100, budget=budget) == max(fitting)
        else:
            with pytest.raises(ConfigError, match="memory_budget_gib"):
                _fraction(layers, 8, 100, budget=budget)


def test_without_room_the_error_has_what_is_needed() -> None:
    with pytest.raises(
        ConfigError, match=r"given: .*=10 .*; allowed: at least \d+ bytes .* of 4 ranks"
    ):
        _fraction((LayerShape("x", 100, 100, 10000),), 4, 10, budget=10.0)


def _random_case(rng: random.Random) -> tuple[Workload, Calibration, int]:
    workload = kfac_workload(
        _random_layers(rng, rng.randint(1, 6)), inverse_update_steps=rng.choice([1, 5, 50])
    )
    calibration = Calibration(
        CostModel(rng.uniform(0, 1e-3), 1e-7, 3.0),
        rng.uniform(0, 1e-8),
        Line(rng.uniform(0, 1e-3), rng.uniform(0, 1e-6)),
        seconds_per_layer=rng.uniform(0, 1e-3),
    )
    return workload, calibration, rng.randint(1, 7)


def _seconds(workload: Workload, calibration: Calibration, plan: Plan) -> float:
    step = predict_step(
        workload, calibration, plan, global_batch_size=plan.world_size, micro_batch_size=1
    )
    return step.placed


def test_least_predicted_time_as_by_brute_force() -> None:
    rng, between = random.Random(8), 0
    for _ in range(60):
        workload, calibration, n = _random_case(rng)
        seconds = {
            columns: _seconds(
                workload,
                calibration,
                make_plan(workload.layers, n, 1 / columns, costs=calibration.costs),
            )
            for columns in range(1, n + 1)
        }
        chosen = auto_fraction(workload, calibration, n)
        assert seconds[chosen.num_columns] == min(seconds.values())
        between += 1 < chosen.num_columns < n
    assert between  # arithmetic makes shares between the end points the best


def test_a_plan_in_use_is_kept_unless_another_gains_enough() -> None:
    rng, kept, changed = random.Random(9), 0, 0
    for _ in range(200):
        workload, calibration, n = _random_case(rng)
        columns = rng.randint(1, n)
        previous = make_plan(workload.layers, n, 1 / columns, costs=calibration.costs)
        free = auto_fraction(workload, calibration, n)
        bound = auto_fraction(workload, calibration, n, previous=previous)
        if bound.num_columns == free.num_columns:
            changed += free.num_columns != columns
            continue
        assert bound.num_columns == columns
        assert "kept" in bound.reason
        kept += 1
        plan = make_plan(workload.layers, n, free.fraction, costs=calibration.costs)
        gain = 1 - _seconds(workload, calibration, plan) / _seconds(workload, calibration, previous)
        assert 0 <= gain < HYSTERESIS
    assert kept and changed


def test_a_number_of_columns_that_no_longer_works_is_given_up_with_the_reason() -> None:
    layers = _random_layers(random.Random(1), 8)
    workload = kfac_workload(layers, inverse_update_steps=100)
    many = make_plan(layers, 6, 1 / 6)
    found = auto_fraction(workload, TRAFFIC, 3, previous=many)
    assert found == AutoFraction(1, found.reason)
    assert "6 columns: needs more ranks" in found.reason
    all_everywhere = make_plan(layers, 3, 1.0)
    budget = 4.0 * max(memory_elements(make_plan(layers, 3, 1 / 3), layers)) * 1.05
    found = auto_fraction(workload, TRAFFIC, 3, memory_budget_bytes=budget, previous=all_everywhere)
    assert found.num_columns > 1
    assert "does not fit the budget" in found.reason


def test_a_faster_network_or_slower_products_divide_more() -> None:
    layers = tuple(LayerShape(f"x{i}", 256, 256, 256**2) for i in range(16))
    workload = kfac_workload(layers, inverse_update_steps=100)
    slow_network = Calibration(CostModel(0.0, 1e-9, 3.0), 1e-11, Line(1e-3, 1e-8))
    assert auto_fraction(workload, slow_network, 8).num_columns == 1
    fast_network = replace(slow_network, network=Line(1e-6, 1e-12))
    assert auto_fraction(workload, fast_network, 8).num_columns == 8
