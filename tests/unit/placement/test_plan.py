from __future__ import annotations

import json
from fractions import Fraction

import pytest

from elastic_kfac.errors import ConfigError, StateError, UsageError
from elastic_kfac.placement.costs import COMPUTE, LayerShape
from elastic_kfac.placement.plan import (
    LayerPlacement,
    Plan,
    assign_receivers,
    columns_for_fraction,
    grid_columns,
)
from elastic_kfac.placement.planner import make_plan

LAYERS = [
    LayerShape("conv1", 10, 8, 80),
    LayerShape("conv2", 73, 16, 73 * 16),
    LayerShape("conv3", 145, 16, 145 * 16),
    LayerShape("fc", 65, 10, 650),
]


@pytest.mark.parametrize("world_size", range(1, 65))
def test_columns_for_fraction_every_divisor_gives_the_kaisa_grid(world_size: int) -> None:
    for m in range(1, world_size + 1):
        if world_size % m == 0:
            assert columns_for_fraction(world_size, m / world_size) == world_size // m


@pytest.mark.parametrize("world_size", range(1, 65))
def test_columns_for_fraction_is_the_nearest_reciprocal_and_monotone(world_size: int) -> None:
    last = world_size
    for thousandths in range(1, 1001):
        f = thousandths / 1000
        exact = 1 / Fraction(thousandths, 1000)
        brute_force = min(range(1, world_size + 1), key=lambda p, exact=exact: (abs(p - exact), -p))
        found = columns_for_fraction(world_size, f)
        assert found == brute_force
        assert found <= last
        last = found


def test_columns_for_fraction_tie_takes_less_memory() -> None:
    assert columns_for_fraction(6, 2 / 3) == 2
    assert columns_for_fraction(6, 2 / 5) == 3


@pytest.mark.parametrize("wrong", [0, -0.5, 1.0001, 3, float("nan")])
def test_columns_for_fraction_outside_the_interval_is_refused(wrong: float) -> None:
    with pytest.raises(ConfigError, match="0 < grad_worker_frac <= 1"):
        columns_for_fraction(4, wrong)


def test_columns_for_fraction_without_ranks_is_refused() -> None:
    with pytest.raises(UsageError, match="needs ranks"):
        columns_for_fraction(0, 1.0)


@pytest.mark.parametrize("world_size", range(1, 33))
def test_grid_partitions_the_ranks_in_columns_that_differ_by_one(world_size: int) -> None:
    for num_columns in range(1, world_size + 1):
        columns = grid_columns(world_size, num_columns)
        assert sorted(rank for column in columns for rank in column) == list(range(world_size))
        sizes = [len(column) for column in columns]
        assert set(sizes) <= {world_size // num_columns, -(-world_size // num_columns)}


def test_grid_of_eight_ranks_is_the_published_example() -> None:
    assert grid_columns(8, 4) == ((0, 4), (1, 5), (2, 6), (3, 7))
    plan = Plan(8, 0.25, grid_columns(8, 4), (LayerPlacement("x", 1, 1, 5),))
    assert plan.receiver_groups("x") == ((1, 0, 2, 3), (5, 4, 6, 7))


@pytest.mark.parametrize("world_size", range(1, 25))
def test_receivers_are_rows_when_columns_divide_and_balanced_otherwise(world_size: int) -> None:
    for num_columns in range(1, world_size + 1):
        for column in range(num_columns):
            sources = assign_receivers(world_size, num_columns, column)
            workers = set(range(column, world_size, num_columns))
            served = dict.fromkeys(workers, 0)
            for rank, source in enumerate(sources):
                assert source in workers
                assert (source == rank) == (rank in workers)
                served[source] += source != rank
                if world_size % num_columns == 0:
                    assert source // num_columns == rank // num_columns
            assert max(served.values()) - min(served.values()) <= 1


@pytest.mark.parametrize(("world_size", "num_columns"), [(5, 2), (7, 3), (9, 4), (6, 6), (4, 1)])
def test_every_non_worker_is_in_exactly_one_receiver_group(
    world_size: int, num_columns: int
) -> None:
    plan = make_plan(LAYERS, world_size, 1 / num_columns)
    for layer in LAYERS:
        groups = plan.receiver_groups(layer.name)
        receivers = [rank for group in groups for rank in group[1:]]
        workers = plan.gradient_workers(layer.name)
        assert sorted([*receivers, *workers]) == list(range(world_size))
        for rank in range(world_size):
            group = plan.receiver_group(layer.name, rank)
            assert group == () or (group in groups and rank in group)
            assert plan.is_gradient_worker(layer.name, rank) == (rank in workers)
            if rank not in workers:
                assert group[0] == plan.source(layer.name, rank)
            else:
                assert plan.source(layer.name, rank) == rank


def test_worker_group_is_the_column_that_holds_both_inverse_workers() -> None:
    plan = make_plan(LAYERS, 8, 0.25, colocate=False)
    for placement in plan.layers:
        group = plan.worker_group(placement.name)
        assert {placement.a_worker, placement.g_worker} <= set(group)
        assert placement.a_worker != placement.g_worker


@pytest.mark.parametrize(
    ("fraction", "strategy"), [(0.25, "MEM-OPT"), (0.5, "HYBRID-OPT"), (1.0, "COMM-OPT")]
)
def test_strategy_is_named_after_the_fraction(fraction: float, strategy: str) -> None:
    plan = make_plan(LAYERS, 4, fraction)
    assert plan.strategy == strategy
    assert plan.grad_worker_frac == fraction


def test_plan_survives_json_and_keeps_its_hash() -> None:
    plan = make_plan(LAYERS, 7, 0.5, colocate=False)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.sha256 == plan.sha256
    assert again.sha256 != make_plan(LAYERS, 7, 1.0).sha256


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"world_size": 2, "columns": 3, "layers": []},
        {"world_size": 4, "columns": 2, "layers": [["x", 0, 1, 0]]},
        {"world_size": 4, "columns": 2, "layers": [["x", 0, 0, 4]]},
        {"world_size": 4, "columns": 2, "layers": [["x", 0, 0]]},
    ],
)
def test_plan_from_something_else_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(StateError, match="not a stored plan"):
        Plan.from_dict(broken)


def test_plan_prints_one_row_per_layer() -> None:
    text = str(make_plan(LAYERS, 8, 0.25, costs=COMPUTE))
    lines = text.splitlines()
    assert lines[0].startswith("plan for 8 ranks: 4 columns of 2 (grad_worker_frac 0.25, HYBRID")
    assert [line.split()[0] for line in lines[2:]] == [layer.name for layer in LAYERS]
    assert "2 or 3" in str(make_plan(LAYERS, 5, 0.5)).splitlines()[0]


def test_plan_diff_names_what_changed() -> None:
    old = Plan(
        4, 0.5, grid_columns(4, 2), (LayerPlacement("a", 0, 0, 0), LayerPlacement("b", 1, 1, 1))
    )
    new = Plan(
        4, 0.5, grid_columns(4, 2), (LayerPlacement("a", 0, 0, 2), LayerPlacement("c", 1, 1, 1))
    )
    assert old.diff(old) == []
    assert old.diff(new) == [
        "a: workers 0,2, A at 0, G at 0 -> workers 0,2, A at 0, G at 2",
        "b: workers 1,3, A at 1, G at 1 -> absent",
        "c: absent -> workers 1,3, A at 1, G at 1",
    ]
    smaller = make_plan(LAYERS, 3, 1 / 3)
    first_two = make_plan(LAYERS, 4, 0.5).diff(smaller)[:2]
    assert first_two == [
        "world_size: 4 -> 3",
        "columns: 2 -> 3 (grad_worker_frac 0.5 -> 0.3333)",
    ]


def test_plan_unknown_layer_is_named() -> None:
    with pytest.raises(UsageError, match="given: nose; allowed: conv1"):
        make_plan(LAYERS, 2, 1.0).source("nose", 0)
