from __future__ import annotations

import itertools
import random

import pytest

from elastic_kfac.errors import UsageError
from elastic_kfac.placement.costs import COMPUTE, CostModel, LayerShape
from elastic_kfac.placement.plan import Plan, columns_for_fraction, grid_columns
from elastic_kfac.placement.planner import (
    make_plan,
    moved_elements,
    rank_loads,
)

LINEAR = CostModel(c0=0.0, c1=1.0, p=1.0)


def _random_layers(rng: random.Random, count: int, largest: int) -> list[LayerShape]:
    layers = []
    for index in range(count):
        a, g = rng.randint(1, largest), rng.randint(1, largest)
        layers.append(LayerShape(f"layer{index}", a, g, a * g))
    return layers


def _places(world_size: int, num_columns: int, colocate: bool) -> list[tuple[int, int, int]]:
    places = []
    for column, ranks in enumerate(grid_columns(world_size, num_columns)):
        for a, g in itertools.product(ranks, ranks):
            if (a == g) == (colocate or len(ranks) == 1):
                places.append((column, a, g))
    return places


def _makespan(
    layers: list[LayerShape], chosen: tuple[tuple[int, int, int], ...], world_size: int
) -> int:
    loads = [0] * world_size
    for layer, (_, a, g) in zip(layers, chosen, strict=True):
        loads[a] += layer.a_dim
        loads[g] += layer.g_dim
    return max(loads)


@pytest.mark.parametrize("colocate", [True, False])
def test_makespan_within_four_thirds_of_the_brute_forced_optimum(colocate: bool) -> None:
    rng = random.Random(7)
    worst = 0.0
    for _ in range(120):
        world_size = rng.randint(2, 5)
        num_columns = rng.randint(1, world_size)
        layers = _random_layers(rng, rng.randint(2, 4), 30)
        plan = make_plan(layers, world_size, 1 / num_columns, colocate=colocate, costs=LINEAR)
        places = _places(world_size, num_columns, colocate)
        optimum = min(
            _makespan(layers, chosen, world_size)
            for chosen in itertools.product(places, repeat=len(layers))
        )
        worst = max(worst, max(rank_loads(plan, layers, LINEAR)) / optimum)
    assert worst <= 4 / 3


def test_equal_costs_are_spread_by_name() -> None:
    layers = [LayerShape(name, 5, 5, 25) for name in ("d", "b", "c", "a")]
    plan = make_plan(layers, 4, 0.25)
    assert {x.name: x.a_worker for x in plan.layers} == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert [x.name for x in plan.layers] == ["d", "b", "c", "a"]


def test_plan_does_not_depend_on_the_order_of_layers() -> None:
    rng = random.Random(3)
    layers = _random_layers(rng, 20, 200)
    shuffled = rng.sample(layers, len(layers))
    first = {x.name: x for x in make_plan(layers, 6, 0.5).layers}
    assert first == {x.name: x for x in make_plan(shuffled, 6, 0.5).layers}


def test_ranks_beyond_the_layers_own_nothing() -> None:
    plan = make_plan([LayerShape("only", 4, 4, 16)], 5, 0.2)
    assert [(x.a_worker, x.g_worker) for x in plan.layers] == [(0, 0)]


def test_no_layers_makes_an_empty_plan() -> None:
    plan = make_plan([], 3, 1.0, previous=make_plan([], 2, 1.0))
    assert plan.layers == ()


def test_copies_of_a_grouped_convolution_count_as_many() -> None:
    costs = CostModel(c0=1.0, c1=0.0, p=1.0)
    layers = [LayerShape("grouped", 9, 1, 72, copies=8)] + [
        LayerShape(f"x{i}", 9, 1, 9) for i in range(4)
    ]
    plan = make_plan(layers, 2, 0.5, costs=costs)
    assert rank_loads(plan, layers, costs) == [16.0, 8.0]


def test_diagonal_factors_cost_nothing_to_decompose() -> None:
    layers = [LayerShape("embedding", 0, 10, 1000), LayerShape("norm", 0, 0, 20)]
    plan = make_plan(layers, 2, 0.5, costs=COMPUTE)
    assert sum(rank_loads(plan, layers, COMPUTE)) == 1000.0


def test_two_layers_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="given: x"):
        make_plan([LayerShape("x", 1, 1, 1)] * 2, 2, 1.0)


# -- close to the plan before ---------------------------------------------------------------------


def _scrambled(rng: random.Random, layers: list[LayerShape], world_size: int, num: int) -> Plan:
    places = _places(world_size, num, True)
    stored = [[layer.name, *rng.choice(places)] for layer in layers]
    return Plan.from_dict({"world_size": world_size, "columns": num, "layers": stored})


@pytest.mark.parametrize("colocate", [True, False])
def test_fewest_elements_move_among_plans_of_equal_makespan(colocate: bool) -> None:
    rng = random.Random(11)
    for _ in range(60):
        old_size, new_size = rng.randint(1, 4), rng.randint(2, 4)
        num_columns = rng.randint(1, new_size)
        layers = _random_layers(rng, rng.randint(2, 4), 6)
        previous = _scrambled(rng, layers, old_size, rng.randint(1, old_size))
        plan = make_plan(
            layers, new_size, 1 / num_columns, colocate=colocate, costs=LINEAR, previous=previous
        )
        makespan = max(rank_loads(plan, layers, LINEAR))
        without = make_plan(layers, new_size, 1 / num_columns, colocate=colocate, costs=LINEAR)
        assert makespan <= max(rank_loads(without, layers, LINEAR))
        places = _places(new_size, num_columns, colocate)
        fewest = min(
            moved_elements(previous, _plan_of(layers, new_size, num_columns, chosen), layers)
            for chosen in itertools.product(places, repeat=len(layers))
            if _makespan(layers, chosen, new_size) <= makespan
        )
        assert moved_elements(previous, plan, layers) == fewest


def _plan_of(
    layers: list[LayerShape],
    world_size: int,
    num_columns: int,
    chosen: tuple[tuple[int, int, int], ...],
) -> Plan:
    stored = [[layer.name, *place] for layer, place in zip(layers, chosen, strict=True)]
    return Plan.from_dict({"world_size": world_size, "columns": num_columns, "layers": stored})


@pytest.mark.parametrize("fraction", [1 / 6, 0.5, 1.0])
def test_same_world_keeps_the_previous_plan(fraction: float) -> None:
    layers = _random_layers(random.Random(1), 40, 300)
    first = make_plan(layers, 6, fraction)
    assert make_plan(layers, 6, fraction, previous=first) == first
    assert moved_elements(first, first, layers) == 0


def test_previous_plan_reduces_what_moves_on_a_larger_case() -> None:
    layers = _random_layers(random.Random(2), 60, 300)
    before = make_plan(layers, 8, 1 / 8, costs=COMPUTE)
    fresh = make_plan(layers, 7, 1 / 7, costs=COMPUTE)
    settled = make_plan(layers, 7, 1 / 7, costs=COMPUTE, previous=before)
    loads = [max(rank_loads(plan, layers, COMPUTE)) for plan in (fresh, settled)]
    assert loads[1] <= loads[0] * (1 + 1e-6)
    assert moved_elements(before, settled, layers) < 0.75 * moved_elements(before, fresh, layers)


def test_renumbered_survivors_keep_their_layers() -> None:
    layers = _random_layers(random.Random(5), 9, 50)
    before = make_plan(layers, 3, 1 / 3)
    ranks = [2, 0, 1]  # new rank 0 was rank 2, and so on
    after = make_plan(layers, 3, 1 / 3, previous=before, previous_ranks=ranks)
    assert moved_elements(before, after, layers, ranks) == 0
    for name in (layer.name for layer in layers):
        assert ranks[after.placement(name).a_worker] == before.placement(name).a_worker


def test_joiners_hold_nothing() -> None:
    layers = [LayerShape("x", 3, 2, 6)]
    before = make_plan(layers, 1, 1.0)
    after = make_plan(layers, 2, 1.0, previous=before)
    assert moved_elements(before, after, layers) == 9 + 4 + 3 + 2
    everyone_new = moved_elements(before, after, layers, [None, None])
    assert everyone_new == 2 * (9 + 4 + 3 + 2)


def test_previous_ranks_of_another_length_are_refused() -> None:
    layers = [LayerShape("x", 3, 2, 6)]
    before = make_plan(layers, 1, 1.0)
    with pytest.raises(UsageError, match="previous_ranks"):
        make_plan(layers, 2, 1.0, previous=before, previous_ranks=[0])


def test_plan_columns_are_those_of_the_rounding_rule() -> None:
    layers = _random_layers(random.Random(6), 5, 9)
    for fraction in (0.2, 0.3, 0.4, 0.7, 1.0):
        assert len(make_plan(layers, 7, fraction).columns) == columns_for_fraction(7, fraction)
