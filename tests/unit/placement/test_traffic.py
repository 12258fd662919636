from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest

from elastic_kfac.errors import UsageError
from elastic_kfac.placement.costs import (
    CHOLESKY_ONE_CORE,
    COMPUTE,
    EIGH_ONE_CORE,
    CostModel,
    LayerShape,
    default_costs,
    factor_elements,
    fit_costs,
    precondition_flops,
    second_order_elements,
    weight_elements,
)
from elastic_kfac.placement.planner import make_plan, rank_loads
from elastic_kfac.placement.traffic import memory_elements, traffic_per_step

Layers = tuple[LayerShape, ...]


def test_resnet50_counts_are_those_of_the_published_model(resnet50: Layers) -> None:
    assert len(resnet50) == 54
    assert max(layer.a_dim for layer in resnet50) == 4608
    mega = 1e6
    assert factor_elements(resnet50) / mega == pytest.approx(153.8, abs=0.1)
    assert second_order_elements(resnet50) / mega == pytest.approx(179.3, abs=0.1)
    assert weight_elements(resnet50) / mega == pytest.approx(25.5, abs=0.1)
    mebi = 4 / 2**20
    assert factor_elements(resnet50) * mebi == pytest.approx(587, abs=0.5)
    assert factor_elements(resnet50, packed=True) * mebi == pytest.approx(294, abs=0.5)
    assert second_order_elements(resnet50) * mebi == pytest.approx(684, abs=0.5)


@pytest.mark.parametrize(("workers", "mebibytes"), [(1, 598), (32, 929), (64, 1271)])
def test_resnet50_overhead_on_64_ranks(resnet50: Layers, workers: int, mebibytes: int) -> None:
    plan = make_plan(resnet50, 64, workers / 64)
    held = memory_elements(plan, resnet50)
    assert sum(held) / 64 * 4 / 2**20 == pytest.approx(mebibytes, abs=0.6)


def test_memory_is_linear_in_the_fraction(resnet50: Layers) -> None:
    fractions = [m / 64 for m in (1, 2, 4, 8, 16, 32, 64)]
    mean = [sum(memory_elements(make_plan(resnet50, 64, f), resnet50)) / 64 for f in fractions]
    s, e = factor_elements(resnet50), second_order_elements(resnet50)
    assert mean == [s + f * e for f in fractions]
    assert np.corrcoef(fractions, mean)[0, 1] ** 2 > 0.999


def test_resnet50_speed_up_saturates_as_the_cost_constant_allows(resnet50: Layers) -> None:
    def saturation(constant: float) -> float:
        mean_cube = sum(COMPUTE.a_seconds(x) + COMPUTE.g_seconds(x) for x in resnet50) / 54
        costs = CostModel(c0=constant * mean_cube, c1=1.0, p=3.0)
        loads = rank_loads(make_plan(resnet50, 1024, 1.0, costs=costs), resnet50, costs)
        return sum(loads) / max(loads)

    assert saturation(0.0) == pytest.approx(4.6, abs=0.05)
    five = make_plan(resnet50, 5, 1.0, costs=COMPUTE)
    loads = rank_loads(five, resnet50, COMPUTE)
    assert sum(loads) / max(loads) == pytest.approx(4.6, abs=0.05)
    assert saturation(0.5) > 6 and saturation(2.0) > saturation(0.5)
    assert saturation(10.0) > 20


LAYERS = [
    LayerShape("a", 10, 7, 70),
    LayerShape("b", 3, 9, 27),
    LayerShape("grouped", 5, 2, 40, copies=4),
    LayerShape("embedding", 0, 6, 120),
    LayerShape("norm", 0, 0, 16),
]


@pytest.mark.parametrize("world_size", [1, 2, 4, 6, 8])
def test_traffic_equals_the_formulas_where_columns_divide(world_size: int) -> None:
    s = factor_elements(LAYERS, packed=True)
    e, w = second_order_elements(LAYERS), weight_elements(LAYERS)
    for m in range(1, world_size + 1):
        if world_size % m:
            continue
        f = Fraction(m, world_size)
        plan = make_plan(LAYERS, world_size, m / world_size)
        traffic = traffic_per_step(
            plan, LAYERS, factor_update_steps=2, inverse_update_steps=10, parameter_elements=1000
        )
        both = Fraction(2 * (world_size - 1), world_size)
        assert traffic.preconditioned_gradients == w * (1 - f)
        assert traffic.second_order == e * (f - Fraction(1, world_size)) / 10
        assert traffic.factors == both * s / 2
        assert traffic.gradients == both * 1000
        assert traffic.total == sum(
            (w * (1 - f), e * (f - Fraction(1, world_size)) / 10, both * s / 2, both * 1000),
            Fraction(0),
        )


@pytest.mark.parametrize(("world_size", "num_columns"), [(5, 2), (7, 3), (9, 4), (3, 3)])
def test_traffic_equals_the_broadcasts_of_the_plan_one_by_one(
    world_size: int, num_columns: int
) -> None:
    plan = make_plan(LAYERS, world_size, 1 / num_columns, colocate=False)
    gradients = second_order = 0
    for layer in LAYERS:
        for group in plan.receiver_groups(layer.name):
            gradients += layer.weight_elements * (len(group) - 1)
        held = second_order_elements([layer], precompute=False)
        second_order += held * (len(plan.worker_group(layer.name)) - 1)
    traffic = traffic_per_step(
        plan, LAYERS, factor_update_steps=1, inverse_update_steps=1, precompute=False
    )
    assert traffic.preconditioned_gradients * world_size == gradients
    assert traffic.second_order * world_size == second_order


def test_elements_of_every_kind_of_layer() -> None:
    by_name = {layer.name: layer for layer in LAYERS}
    assert factor_elements([by_name["grouped"]]) == 4 * (25 + 4)
    assert factor_elements([by_name["grouped"]], packed=True) == 4 * (15 + 3)
    assert factor_elements([by_name["embedding"]]) == 20 + 36
    assert factor_elements([by_name["norm"]]) == 8 * 4  # a 2x2 block for each of 8 channels
    full_norm = LayerShape("full", 0, 16, 16)
    assert factor_elements([full_norm]) == 256
    a = [by_name["a"]]
    assert second_order_elements(a) == 100 + 49 + 70
    assert second_order_elements(a, precompute=False) == 100 + 49 + 17
    assert second_order_elements(a, method="inverse") == 100 + 49
    assert precondition_flops(a[0]) == 2 * 2 * 70 * 17
    assert precondition_flops(a[0], method="inverse") == 2 * 70 * 17


def test_fit_costs_recovers_the_model_in_relative_error() -> None:
    truth = CostModel(c0=2e-4, c1=3e-10, p=2.75)
    dims = [16, 64, 128, 300, 700, 1500, 3000]
    fit = fit_costs(dims, [truth.seconds(d) for d in dims])
    assert fit.p == pytest.approx(2.75)
    assert fit.c0 == pytest.approx(2e-4, rel=1e-6)
    assert fit.c1 == pytest.approx(3e-10, rel=1e-6)
    assert all(abs(fit.seconds(d) / truth.seconds(d) - 1) < 1e-9 for d in dims)
    rng = random.Random(0)
    noisy = [truth.seconds(d) * rng.uniform(0.9, 1.1) for d in dims]
    fit = fit_costs(dims, noisy)
    assert all(abs(fit.seconds(d) / t - 1) < 0.15 for d, t in zip(dims, noisy, strict=True))


def test_fit_costs_never_predicts_a_negative_time() -> None:
    fit = fit_costs([10, 20, 1000], [1e-6, 1e-5, 1.0])
    assert fit.c0 >= 0 and fit.c1 >= 0


def test_fit_costs_refuses_one_width() -> None:
    with pytest.raises(UsageError, match="two factor widths"):
        fit_costs([10, 10], [1.0, 2.0])


@pytest.mark.parametrize(
    ("model", "measured_ms"),
    [
        (EIGH_ONE_CORE, {65: 0.38, 289: 6.3, 577: 37, 1153: 273, 2304: 2107}),
        (CHOLESKY_ONE_CORE, {65: 0.09, 289: 2.0, 577: 7.8, 1153: 65, 2304: 388}),
    ],
)
def test_stored_costs_are_near_the_measurements(
    model: CostModel, measured_ms: dict[int, float]
) -> None:
    for width, milliseconds in measured_ms.items():
        assert 0.75 < model.seconds(width) * 1e3 / milliseconds < 1.25
    assert default_costs("eigen") == EIGH_ONE_CORE
    assert default_costs("inverse") == CHOLESKY_ONE_CORE
